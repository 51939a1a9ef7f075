"""From text to windows of tokens.

A row of a JSON Lines or Parquet file or of a dataset is a document, and so is a paragraph (what blank lines separate)
of a text file. Documents are tokenised with the tokenizer's special tokens, ended by its end-of-text token where it has
one, put one behind the other and cut into windows of equal length. There is no padding: the tail that fills no window
is dropped, once for every ``PACKED_TOGETHER`` documents.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from quietstar.training.sources import explained, read

logger = logging.get_logger(__name__)

PACKED_TOGETHER = 1000


def load_documents(data: str, config: str | None = None, split: str = "train", text_column: str = "text") -> Dataset:
    """Documents in a column ``text``. Rows without text are left out, and their number is said.

    Args:
        data: a text, JSON Lines or Parquet file, compressed or not; a pattern of such files; the name of a dataset; or
            a folder with one (of such files, or saved by ``save_to_disk``).
        config, split: which part of a dataset; a file has no configuration and the one split "train".
        text_column: where the text is; a text file has none.

    Raises:
        ValueError: no such file, an empty or broken one, no such column or one without text.
    """
    dataset = read(data, config, split)
    if dataset.info.builder_name == "text":
        text_column = "text"
    if text_column not in dataset.column_names:
        columns = ", ".join(map(repr, dataset.column_names))
        raise ValueError(f"text_column must be one of {columns}, got {text_column!r}")
    kind = dataset.features[text_column]
    if (dtype := getattr(kind, "dtype", kind)) not in ("string", "large_string"):
        raise ValueError(f"text_column must hold text, got {dtype} in {text_column!r}")
    dataset = dataset.select_columns(text_column)
    if text_column != "text":
        dataset = dataset.rename_column(text_column, "text")
    with explained(data):  # the bytes are decoded only here
        documents = dataset.filter(lambda texts: [bool(text) for text in texts], input_columns="text", batched=True)
    if len(documents) == 0:
        raise ValueError(f"data must hold text, got none in {len(dataset)} rows of {data}")
    if empty := len(dataset) - len(documents):
        logger.warning(f"{empty} of {len(dataset)} documents of {data} are left out: they hold no text")
    return documents


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
