"""Documents that are conversations or token ids."""

import json

import pytest
from datasets import Dataset

from quietstar.training.data import load_documents, pack_dataset
from quietstar.training.rows import documents_of

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% if m.tool is defined %}!{% endif %}{% endfor %}"
CHAT = [
    [{"role": "a", "content": "b c"}, {"role": "c", "content": "a"}],
    [{"role": "a", "content": "b", "tool": None}],
]
CHAT_IDS = [[1, 2, 3, 3, 1], [1, 2]]


@pytest.fixture
def chat(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def write(tmp_path):
    """Writes rows of one column into a file; its name."""

    def write(**columns):
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        return str(file)

    return write


def windows(documents, tokenizer, size, **options):
    return [list(row["input_ids"]) for row in pack_dataset(documents, tokenizer, size, **options)]


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
@pytest.mark.parametrize("column", ["messages", "talk"])
@pytest.mark.parametrize("chats", [CHAT, [CHAT[0], CHAT[0]]], ids=["fields differ", "same fields"])
def test_conversations_go_through_the_template(write, chat, streaming, column, chats):
    source = write(**{column: [*chats, []]})
    documents = load_documents(source, text_column=None if column == "messages" else column, streaming=streaming)
    expected = [token for talk in chats for token in CHAT_IDS[CHAT.index(talk)]]
    assert windows(documents, chat, len(expected)) == [expected]


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
@pytest.mark.parametrize("column", ["input_ids", "tokens"])
def test_token_ids_are_what_they_are(write, tokenizer, streaming, column):
    source = write(**{column: [[3, 1], [], [2, 2, 1, 1]]})
    documents = load_documents(source, text_column=None if column == "input_ids" else column, streaming=streaming)
    assert windows(documents, tokenizer, 3) == [[3, 1, 2], [2, 1, 1]]


def test_what_stands_beside_token_ids(write, tokenizer):
    source = write(
        input_ids=[[3, 1, 2], [2, 1, 3]], labels=[[-100, 1, 2], [2, 1, 3]], attention_mask=[[1, 1, 1], [0, 1, 1]],
        n=[1, 2],
    )  # fmt: skip
    rows = pack_dataset(load_documents(source), tokenizer, 5)
    assert list(rows) == [{"input_ids": [3, 1, 2, 1, 3], "labels": [-100, 1, 2, 1, 3]}]


def test_the_first_usual_column_is_taken(write):
    source = write(input_ids=[[1]], messages=[CHAT[0]], text=["a b"])
    assert list(load_documents(source)) == [{"text": "a b"}]
    assert load_documents(source, text_column="input_ids").column_names == ["input_ids"]


@pytest.mark.parametrize(
    ("columns", "wanted", "message"),
    [
        ({"body": ["a"], "n": [1]}, None, "text_column must be one of 'body', 'n', got none of 'text', 'mess"),
        ({"body": ["a"]}, "text", "text_column must be one of 'body', got 'text'"),
        ({"messages": ["a"]}, None, "text_column must hold chat messages, got string in 'messages'"),
        ({"messages": [[{"from": "a", "value": "b"}]]}, None, "text_column must hold chat messages, got List.*'from'"),
        ({"input_ids": [[0.5]]}, None, "text_column must hold token ids, got List.*float64.* in 'input_ids'"),
        ({"n": [1]}, "n", r"text_column must hold text, got int64 in 'n' \(chat messages and token ids are taken too"),
    ],
)  # fmt: skip
def test_columns_that_hold_something_else(write, columns, wanted, message):
    with pytest.raises(ValueError, match=message):
        load_documents(write(**columns), text_column=wanted)


@pytest.mark.parametrize(
    ("rows", "template", "message"),
    [
        ({"messages": [CHAT[0]]}, None, "tokenizer must have a chat template for messages, got none in "),
        ({"messages": [CHAT[0]]}, "{{ raise_exception('no a') }}", "messages must suit the .*'b c'.*: no a"),
        ({"messages": [[{"content": "a"}]]}, TEMPLATE, "messages must have a role and a content each, got "),
        ({"input_ids": [[1, 5]]}, None, r"input_ids must be in \[0, 5\), the model's vocabulary, got 5: "),
        ({"input_ids": [[1, -1]]}, None, r"input_ids must be in \[0, 5\), .*, got -1: "),
        ({"input_ids": [[1, 1]], "labels": [[-100, 7]]}, None, r"labels must be in \[0, 5\), .*, got 7: "),
        ({"input_ids": [[1, 1]], "labels": [[1]]}, None, "labels must be as long as input_ids, got 1 for 2 tokens"),
    ],
)
def test_rows_that_cannot_be_used(tokenizer, rows, template, message):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        pack_dataset(Dataset.from_dict(rows), tokenizer, 2, vocab_size=5)


def test_a_tokenizer_of_more_words_than_the_model(tokenizer):
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 3\), the model's vocabulary, got 3: "):
        pack_dataset(Dataset.from_dict({"text": ["a b c"]}), tokenizer, 2, vocab_size=3)


def test_no_labels_of_their_own(chat):
    assert documents_of({"messages": CHAT}, chat) == (CHAT_IDS, None)
