"""From files to windows."""

import gzip
import json

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from quietstar.training.data import collate_windows, load_documents, pack, pack_dataset, split_documents, tokenize

DOCUMENTS = ["a b c", "b a", "c c c a"]


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
        (
            "text.doc",
            "a,b",
            "text",
            "data must be a file ending in .txt, .jsonl, .json, .parquet, .csv, got .*text.doc",
        ),
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


TEXTS = ["def f(x):\n    return x", "é b", "c"]


def lines(texts=TEXTS, column="text"):
    return "".join(json.dumps({column: text}, ensure_ascii=False) + "\n" for text in texts)


def csv_rows(texts=TEXTS):
    return "n,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(texts))


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + lines().encode()),
        ("bom.txt", b"\xef\xbb\xbf" + "\n\n".join(TEXTS).encode()),
        ("crlf.txt", "\r\n\r\n".join(text.replace("\n", "\r\n") for text in TEXTS).encode()),
        ("crlf.jsonl", lines().replace("\n", "\r\n").encode()),
        ("blank lines.txt", "\n \t\n".join(["", *TEXTS, ""]).encode()),
        ("array.json", json.dumps([{"text": text} for text in TEXTS]).encode()),
        ("lines.jsonl.gz", gzip.compress(lines().encode())),
        ("text.txt.gz", gzip.compress("\n\n".join(TEXTS).encode())),
        ("null.jsonl", lines([None, *TEXTS, ""]).encode()),
        ("rows.csv", csv_rows([*TEXTS, ""]).encode()),
        ("bom.csv", b"\xef\xbb\xbf" + csv_rows().encode()),
        ("rows.csv.gz", gzip.compress(csv_rows().encode())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_same_text_in_many_guises(tmp_path, name, content, streaming):
    (tmp_path / name).write_bytes(content)
    assert list(load_documents(str(tmp_path / name), streaming=streaming)) == [{"text": text} for text in TEXTS]


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
@pytest.mark.parametrize("kind", ["text", "lines", "parquet", "csv", "saved", "saved splits", "pattern"])
def test_folders(tmp_path, kind, streaming):
    folder = tmp_path / "folder"
    folder.mkdir()
    half = [Dataset.from_dict({"text": texts}) for texts in (TEXTS[:2], TEXTS[2:])]
    for name, part in zip("ab", half, strict=True):
        if kind == "text":
            (folder / f"{name}.txt").write_text("\n\n".join(part["text"]))
        elif kind == "parquet":
            part.to_parquet(folder / f"{name}.parquet")
        elif kind == "csv":
            part.to_csv(folder / f"{name}.csv")
        else:
            (folder / f"{name}.jsonl").write_text(lines(part["text"]))
    source, split = str(folder / "*.jsonl" if kind == "pattern" else folder), "train"
    if kind.startswith("saved"):
        source = str(tmp_path / "saved")
        whole = Dataset.from_dict({"text": TEXTS})
        (DatasetDict(train=half[0], test=whole) if kind == "saved splits" else whole).save_to_disk(source)
        split = "test" if kind == "saved splits" else split
    assert list(load_documents(source, split=split, streaming=streaming)) == [{"text": text} for text in TEXTS]
    if streaming:
        with pytest.raises(ValueError, match=r"data_split must be a whole split with streaming, got '.*\[:1\]'"):
            load_documents(source, split=f"{split}[:1]", streaming=True)
    else:
        assert load_documents(source, split=f"{split}[:1]")["text"] == TEXTS[:1]


def test_what_looks_like_nothing_is_text(tmp_path):
    (tmp_path / "a.csv").write_text("text\nNA\nnull\n")
    assert load_documents(str(tmp_path / "a.csv"))["text"] == ["NA", "null"]


def test_what_holds_no_text_is_counted(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("quietstar.training.data.logger.warning", warnings.append)
    file = tmp_path / "text.jsonl"
    file.write_text(lines(["a", None, ""]) + '{"body": "b"}\n')
    assert load_documents(str(file))["text"] == ["a"]
    assert warnings == [f"3 of 4 documents of {file} are left out: they hold no text"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "a\ncafé".encode("latin-1"), r"text in UTF-8, got line 2 of .*latin\.txt: 'utf-8' codec can't"),
        ("latin.jsonl", lines().encode("latin-1"), r"JSON Lines in UTF-8, got line 2 of .*latin\.jsonl: 'utf-8' codec"),
        ("wide.txt", "abc".encode("utf-16"), r"text in UTF-8, got line 1 of .*wide\.txt: 'utf-8' codec can't decode"),
        ("wide.jsonl", lines().encode("utf-16"), r"JSON Lines in UTF-8, got line 1 of .*wide\.jsonl: 'utf-8' codec"),
        (
            "broken.jsonl",
            (lines() + "{oh\n" + lines()).encode(),
            r"got line 4 of .*: Expecting property name .*column 2",
        ),
        ("cut.jsonl", lines().encode()[:-5], r"got line 3 of .*cut\.jsonl: Expecting value at column 10"),
        ("strings.jsonl", b'"a"\n"b"\n', r"got a str instead of an object in line 1 of .*strings\.jsonl"),
        ("broken.json", b"[{", r"data cannot be read from .*broken\.json: ValueError: Expected object or value"),
        ("no.parquet", lines().encode(), r"data cannot be read from .*no\.parquet: ArrowInvalid: Parquet magic bytes"),
        ("blank.txt", b"\n \n\n", r"data must hold text, got none in 0 rows of .*blank\.txt"),
        ("empty.jsonl", lines(["", ""]).encode(), r"data must hold text, got none in 2 rows of .*empty\.jsonl"),
        ("null.jsonl", lines([None]).encode(), "text_column must hold text, got null in 'text'"),
        ("chat.jsonl", b'{"text": [{"role": "user", "content": "a"}]}', "must hold text, got List.*'role'.* in 'text'"),
        ("tokens.jsonl", b'{"text": [1, 2]}', r"text_column must hold text, got List\(Value\('int64'\)\) in 'text'"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_documents(str(tmp_path / name))


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(
        ValueError, match=r"data cannot be read from .*: EmptyDatasetError: .* doesn't contain any data"
    ):
        load_documents(str(tmp_path))
    with pytest.raises(ValueError, match=r"got nothing at .*/nowhere"):
        load_documents(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"got no file at .*\*\.txt"):
        load_documents(str(tmp_path / "*.txt"))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text(lines())
    with pytest.raises(ValueError, match="data must be a folder of one kind of files, got json and text in"):
        load_documents(str(tmp_path))
    with pytest.raises(ValueError, match="data must be files of one kind, got json and text at"):
        load_documents(str(tmp_path / "*"))
    with pytest.raises(ValueError, match='Unknown split "test"'):
        load_documents(str(tmp_path / "a.txt"), split="test")
    with pytest.raises(ValueError, match="data_config must be left out with a file, got 'en'"):
        load_documents(str(tmp_path / "a.txt"), config="en")


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


def test_anchors_are_padded():
    rows = [{"input_ids": [1, 2, 3], "anchors": anchors} for anchors in ([0, 1], [], [2])]
    assert collate_windows(rows)["anchors"].tolist() == [[0, 1], [-1, -1], [2, -1]]
    assert collate_windows([rows[1]])["anchors"].tolist() == [[-1]]
    assert "anchors" not in collate_windows([{"input_ids": [1, 2, 3]}])
