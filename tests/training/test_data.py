"""From files to windows."""

import json

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar.training.data import collate_windows, load_documents, pack, pack_dataset, split_documents, tokenize

DOCUMENTS = ["a b c", "b a", "c c c a"]


@pytest.fixture
def tokenizer():
    """Words a, b, c are 1, 2, 3; the end of a text is 0."""
    words = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


def write_text(folder, column):
    (folder / "text.txt").write_text("\n\n".join(DOCUMENTS))
    return folder / "text.txt"


def write_lines(folder, column):
    (folder / "text.jsonl").write_text("\n".join(json.dumps({column: text, "n": 1}) for text in DOCUMENTS))
    return folder / "text.jsonl"


def write_parquet(folder, column):
    Dataset.from_dict({column: DOCUMENTS, "n": [1, 2, 3]}).to_parquet(folder / "text.parquet")
    return folder / "text.parquet"


@pytest.mark.parametrize("write", [write_text, write_lines, write_parquet])
@pytest.mark.parametrize("column", ["text", "body"])
def test_documents_of_files(tmp_path, write, column):
    documents = load_documents(str(write(tmp_path, column)), text_column=column)
    assert documents.column_names == ["text"]
    assert documents["text"] == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("none.txt", None, "text", "data must be a file or the name of a dataset, got no file at .*none.txt"),
        ("empty.txt", "", "text", "data must hold text, got an empty file: .*empty.txt"),
        ("text.csv", "a,b", "text", "data must be a file ending in .txt, .jsonl, .json, .parquet, got .*text.csv"),
        ("text.jsonl", '{"body": "a", "n": 1}', "text", "text_column must be one of 'body', 'n', got 'text'"),
        ("text.jsonl", '{"body": "a", "n": 1}', "n", "text_column must hold text, got int64 in 'n'"),
        ("text.jsonl", '{"body": ["a"]}', "body", "text_column must hold text, got .* in 'body'"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, column, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_documents(str(tmp_path / name), text_column=column)


def test_split_is_by_document_and_by_seed():
    documents = Dataset.from_dict({"text": [str(i) for i in range(40)]})
    train, held_out = split_documents(documents, 0.1, seed=0)
    assert len(held_out) == 4
    assert sorted([*train["text"], *held_out["text"]], key=int) == documents["text"]
    assert split_documents(documents, 0.1, seed=0)[1]["text"] == held_out["text"]
    assert split_documents(documents, 0.1, seed=1)[1]["text"] != held_out["text"]
    assert len(split_documents(documents, 0.001, seed=0)[1]) == 1


@pytest.mark.parametrize(
    ("count", "fraction", "message"), [(9, 1.0, r"must be in \(0, 1\), got 1.0"), (1, 0.5, "no two documents")]
)
def test_impossible_splits(count, fraction, message):
    with pytest.raises(ValueError, match=f"held_out_fraction .*{message}"):
        split_documents(Dataset.from_dict({"text": ["a"] * count}), fraction, seed=0)


def test_documents_are_ended_and_packed_without_padding(tokenizer):
    documents = tokenize([*DOCUMENTS, "", None, "b <end>"], tokenizer)
    assert documents == [[1, 2, 3, 0], [2, 1, 0], [3, 3, 3, 1, 0], [2, 0]]
    assert pack(documents, 5).tolist() == [[1, 2, 3, 0, 2], [1, 0, 3, 3, 3]]
    assert pack([], 5).shape == (0, 5)
    tokenizer.eos_token = None
    assert tokenize(["a b"], tokenizer) == [[1, 2]]


def test_packed_dataset_and_its_batches(tokenizer):
    windows = pack_dataset(Dataset.from_dict({"text": DOCUMENTS}), tokenizer, 5)
    assert windows["input_ids"] == [[1, 2, 3, 0, 2], [1, 0, 3, 3, 3]]
    batch = collate_windows([windows[1], windows[0]])
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 0, 3, 3, 3], [1, 2, 3, 0, 2]]
    assert batch["input_ids"].numpy().dtype == np.int64


def test_text_shorter_than_a_window(tokenizer):
    with pytest.raises(ValueError, match="block_size must be no longer than the text: less than 13 tokens"):
        pack_dataset(Dataset.from_dict({"text": DOCUMENTS}), tokenizer, 13)
