"""From text to windows of tokens.

A row of a JSON Lines or Parquet file or of a dataset is a document, and so is a paragraph (what blank lines separate)
of a text file. Documents are tokenised with the tokenizer's special tokens, ended by its end-of-text token where it has
one, put one behind the other and cut into windows of equal length. There is no padding: the tail that fills no window
is dropped, once for every ``PACKED_TOGETHER`` documents.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
PACKED_TOGETHER = 1000


def load_documents(data: str, config: str | None = None, split: str = "train", text_column: str = "text") -> Dataset:
    """Documents in a column ``text``.

    Args:
        data: a text, JSON Lines or Parquet file, or the name or folder of a dataset.
        config, split: which part of a dataset; not for a file.
        text_column: where the text is; a text file has none.

    Raises:
        ValueError: no such file, an empty file, no such column or one without text.
    """
    path = Path(data)
    if path.suffix in LOADERS or path.is_file():
        if not path.is_file():
            raise ValueError(f"data must be a file or the name of a dataset, got no file at {data}")
        if path.stat().st_size == 0:
            raise ValueError(f"data must hold text, got an empty file: {data}")
        if path.suffix not in LOADERS:
            raise ValueError(f"data must be a file ending in {', '.join(LOADERS)}, got {data}")
        loader = LOADERS[path.suffix]
        if loader == "text":
            text_column = "text"
        options = {"sample_by": "paragraph"} if loader == "text" else {}
        dataset = load_dataset(loader, data_files=str(path), split="train", **options)
    else:
        dataset = load_dataset(data, config, split=split)
    if text_column not in dataset.column_names:
        columns = ", ".join(map(repr, dataset.column_names))
        raise ValueError(f"text_column must be one of {columns}, got {text_column!r}")
    if (dtype := getattr(dataset.features[text_column], "dtype", "a structure")) not in ("string", "large_string"):
        raise ValueError(f"text_column must hold text, got {dtype} in {text_column!r}")
    dataset = dataset.select_columns(text_column)
    return dataset if text_column == "text" else dataset.rename_column(text_column, "text")


def split_documents(documents: Dataset, held_out_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Documents to train on, and at least one held-out document.

    Raises:
        ValueError: a fraction outside (0, 1), or fewer than two documents.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction must be in (0, 1), got {held_out_fraction}")
    if len(documents) < 2:
        raise ValueError(f"held_out_fraction must be 0 where there are no two documents, got {held_out_fraction}")
    held_out = max(1, round(len(documents) * held_out_fraction))
    parts = documents.train_test_split(test_size=held_out, seed=seed)
    return parts["train"], parts["test"]


def tokenize(texts: Sequence[str | None], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text that is not empty, ended by the end-of-text token where the tokenizer has one."""
    texts = [text for text in texts if text]
    if not texts:
        return []
    end = tokenizer.eos_token_id
    documents = tokenizer(texts, verbose=False)["input_ids"]
    return [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in documents]


def pack(documents: Iterable[Sequence[int]], block_size: int) -> np.ndarray:
    """Windows of the documents one behind the other, int64 [windows, block_size]; the tail is dropped."""
    tokens = np.fromiter(chain.from_iterable(documents), dtype=np.int64)
    windows = len(tokens) // block_size
    return tokens[: windows * block_size].reshape(windows, block_size)


def pack_dataset(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int, workers: int | None = None
) -> Dataset:
    """Windows in a column ``input_ids`` of documents in a column ``text``.

    Raises:
        ValueError: all text together is shorter than one window.
    """
    windows = documents.map(
        lambda batch: {"input_ids": pack(tokenize(batch["text"], tokenizer), block_size)},
        batched=True,
        batch_size=PACKED_TOGETHER,
        remove_columns="text",
        num_proc=workers,
        desc=f"Packing windows of {block_size} tokens",
    )
    if len(windows) == 0:
        raise ValueError(f"block_size must be no longer than the text: less than {block_size} tokens")
    return windows


def collate_windows(windows: list[dict[str, Sequence[int]]]) -> dict[str, Tensor]:
    """A batch: input_ids and labels, int64 [B, block_size]. Every token is a label."""
    input_ids = torch.as_tensor(np.array([window["input_ids"] for window in windows]))
    return {"input_ids": input_ids, "labels": input_ids}
