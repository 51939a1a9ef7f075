"""Windows of several sources, of streams, and of documents that see nothing of each other."""

import json
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

from quietstar import QuietStarForCausalLM
from quietstar.training.arguments import DataArguments
from quietstar.training.data import collate_windows, load_documents, positions, split_documents
from quietstar.training.sources import DataError
from quietstar.training.windows import Corpus

STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])


@pytest.fixture
def write(tmp_path):
    """Writes ``count`` documents of ten equal words each; the name of the file."""

    def write(name, word, count):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps({"text": " ".join([word] * 10)}) for _ in range(count)))
        return str(file)

    return write


@pytest.fixture
def windows(base):
    """Windows of ten tokens of the sources; keyword arguments are those of the command."""

    def windows(*data, **options):
        settings = {"block_size": 10, "held_out_fraction": 0} | options
        return Corpus(DataArguments(data=list(data), **settings), seed=0).windows(
            AutoTokenizer.from_pretrained(base), 30
        )

    return windows


def counts(windows):
    """How many windows there are of each word, which is what they begin with."""
    return Counter(int(window["input_ids"][0]) for window in windows)


@STREAMING
def test_all_of_several_sources_is_read_once(write, windows, streaming):
    training, held_out = windows(write("a", "w1", 30), write("b", "w2", 10), streaming=streaming)
    assert counts(training) == {1: 30, 2: 10}
    assert held_out is None


@STREAMING
def test_weights_are_shares_of_windows(write, windows, streaming):
    sources = write("a", "w1", 400), write("b", "w2", 400)
    training, _ = windows(f"{sources[0]}:6", f"{sources[1]}:2", streaming=streaming)
    found = counts(training)
    assert found[1] == 400  # the first that has no more ends the epoch
    assert found[2] == pytest.approx(400 / 3, rel=0.25)


@STREAMING
def test_sources_of_different_kinds_are_mixed(write, windows, tmp_path, streaming):
    file = tmp_path / "ids.jsonl"
    file.write_text("\n".join([json.dumps({"input_ids": [3] * 10, "labels": [-100] * 5 + [3] * 5})] * 4))
    training, _ = windows(write("a", "w1", 4), str(file), streaming=streaming, separate_documents=True)
    batch = collate_windows(list(training))
    assert sorted(batch["input_ids"][:, 0].tolist()) == [1] * 4 + [3] * 4
    masked = batch["labels"][:, 0] == -100
    assert torch.equal(masked, batch["input_ids"][:, 0] == 3)
    assert torch.equal(batch["labels"][:, 5:], batch["input_ids"][:, 5:])
    assert torch.equal(batch["position_ids"], torch.arange(10).expand(8, -1))


@STREAMING
def test_every_source_is_held_out_of(write, windows, streaming):
    sources = write("a", "w1", 300), write("b", "w2", 300)
    # Copies of a document are held out together in a stream: each is made different.
    for file, word in zip(sources, ("w1", "w2"), strict=True):
        with open(file, "w") as lines:
            for i in range(300):
                words = [word] * 8 + [f"w{3 + i % 20}", f"w{3 + i // 20}"]
                lines.write(json.dumps({"text": " ".join(words)}) + "\n")
    options = {"held_out_fraction": 0.1, "streaming": streaming}
    training, held_out = windows(*sources, max_held_out_windows=20, **options)
    assert len(held_out) == 20
    assert all(count >= 5 for count in counts(held_out).values())
    rows = [{tuple(map(int, row["input_ids"])) for row in part} for part in (training, windows(*sources, **options)[1])]
    assert not rows[0] & rows[1]
    assert len(rows[0] | rows[1]) == 600
    assert 30 <= len(rows[1]) <= 90


@STREAMING
def test_other_text_to_evaluate_on(write, windows, streaming):
    training, held_out = windows(
        write("a", "w1", 20), eval_data=[write("b", "w2", 5)], held_out_fraction=0.5, streaming=streaming
    )
    assert counts(training) == {1: 20}
    assert counts(held_out) == {2: 5}


def test_a_stream_is_shuffled_anew_in_every_epoch(write, windows):
    training, _ = windows(write("a", "w1", 40), write("b", "w2", 40), streaming=True)
    epochs = []
    for epoch in (0, 0, 1):
        training.set_epoch(epoch)
        epochs.append([window["input_ids"][0] for window in training])
    assert epochs[0] == epochs[1]
    assert epochs[0] != epochs[2]


def test_what_is_wrong_further_on_in_a_stream_is_said_when_it_is_read(write, windows, tmp_path):
    write("a", "w1", 3000)
    (tmp_path / "b.jsonl").write_text("{oh")
    training, _ = windows(str(tmp_path / "*.jsonl"), streaming=True)
    with pytest.raises(DataError, match=r"data must be JSON Lines in UTF-8, got line 1 of .*b\.jsonl"):
        list(training)


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, {"block_size": 11}, "block_size must be no longer than the text: less than 11 tokens"),
        (9, {"held_out_fraction": 1e-9}, "block_size must be no longer than the text: .* or in what is held out"),
    ],
)
def test_streams_without_a_window(write, windows, count, options, message):
    with pytest.raises(ValueError, match=message):
        windows(write("a", "w1", count), streaming=True, **options)


@pytest.mark.parametrize(
    ("count", "fraction", "message"),
    [
        (2, 0, r"block_size must be no longer than the text: less than 25 tokens, in .*b\.jsonl"),
        (20, 0.1, r"less than 25 tokens, in what is held out of .*a\.jsonl"),
    ],
)
def test_the_source_that_is_too_short_is_named(write, windows, count, fraction, message):
    with pytest.raises(ValueError, match=message):
        windows(write("a", "w1", 20), write("b", "w2", count), block_size=25, held_out_fraction=fraction)


def test_positions_begin_anew_in_every_document_and_window():
    documents = [[5, 6, 7], [8], [], [9, 5, 6, 7, 8, 9]]
    assert positions(documents, 4).tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert positions(documents, 5).tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]


def test_separate_documents_are_as_each_would_be_alone(windows, base, tmp_path):
    texts = ["w1 w2 w3 w4 w5 w6", "w9 w8 w7 w6", "w1 w9 w2 w8 w3 w7 w4 w6 w5 w5"]
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    torch.manual_seed(0)
    model = QuietStarForCausalLM.from_base(base, initial_token_ids=[0], thought_length=0, lookahead=1, num_thoughts=1)
    alone = [
        model(ids, labels=ids).base_nll[0]
        for ids in (torch.tensor([list(map(int, text[1:].split(" w")))]) for text in texts)
    ]
    for separate in (True, False):
        training, _ = windows(str(tmp_path / "text.txt"), separate_documents=separate)
        batch = collate_windows(list(training))
        assert ("position_ids" in batch) == separate
        together = model(**batch).base_nll
        first, second = together[0, :5], together[0, 6:]
        torch.testing.assert_close(first, alone[0])
        torch.testing.assert_close(together[1], alone[2])
        assert torch.allclose(second, alone[1], rtol=1e-5) == separate


def test_a_stream_of_token_ids_and_labels_is_split(tmp_path):
    file = tmp_path / "ids.jsonl"
    file.write_text("\n".join(json.dumps({"input_ids": [i, i], "labels": [-100, i]}) for i in range(200)))
    parts = split_documents(load_documents(str(file), streaming=True), 0.3, seed=0)
    training, held_out = ([row["input_ids"][0] for row in part] for part in parts)
    assert sorted([*training, *held_out]) == list(range(200))
    assert 30 <= len(held_out) <= 90
    other = split_documents(load_documents(str(file), streaming=True), 0.3, seed=1)[1]
    assert [row["input_ids"][0] for row in other] != held_out
