"""Conversion of text into windows of tokens.

A document is a row of a JSON Lines, CSV or Parquet file or of a dataset, or a paragraph of a text file (paragraphs are
separated by blank lines). Text is tokenised with the tokenizer's special tokens and ended by its end-of-text token, if
it has one. Documents may also be conversations or token ids (``quietstar.training.rows``). Documents are concatenated
and cut into windows of equal length. There is no padding: the remainder that fills no window is dropped, once for every
``PACKED_TOGETHER`` documents.
"""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import chain

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from quietstar.models.documents import IGNORE_INDEX
from quietstar.training.rows import (
    COLUMNS,
    MESSAGES,
    TOKEN_IDS,
    check_ids,
    check_template,
    choose_column,
    documents_of,
    of_tokens,
    tokenize,
)
from quietstar.training.sources import explained, read

__all__ = ["collate_windows", "load_documents", "pack", "pack_dataset", "split_documents", "tokenize"]

logger = logging.get_logger(__name__)

PACKED_TOGETHER = 1000
_LOOKED_AT = 100  # rows read to find out the columns of a stream without a schema


def load_documents(
    data: str, config: str | None = None, split: str = "train", text_column: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """Load documents into a column ``text``, ``messages`` or ``input_ids``; the latter may come with ``labels``.

    Rows without text are skipped, and their number is reported if it is known.

    Args:
        data: a text, JSON Lines, CSV or Parquet file, compressed or not; a pattern of such files; the name of a
            dataset; or a folder that holds one (such files, or a dataset saved by ``save_to_disk``).
        config, split: configuration and split of a dataset. A file has no configuration and only the split "train".
        text_column: the column of the documents: text, chat messages or lists of token ids. A text file has no columns.
            Default: the first of ``text``, ``messages`` and ``input_ids`` that exists.
        streaming: whether to read the text while training, never all of it at once.

    Raises:
        ValueError: the file does not exist, is empty or broken, or the column does not exist or has no text.
    """
    dataset = read(data, config, split, streaming)
    with explained(data):
        features = dataset.features or Dataset.from_list(list(dataset.take(_LOOKED_AT))).features
    column, kind = choose_column(features, None if dataset.info.builder_name == "text" else text_column)
    beside = of_tokens(features) if kind == TOKEN_IDS else []
    dataset = dataset.select_columns([column, *beside])
    if column != kind:
        dataset = dataset.rename_column(column, kind)
    with explained(data):  # bytes are decoded here, so errors in them show up here
        documents = dataset.filter(lambda rows: [bool(row) for row in rows], input_columns=kind, batched=True)
    if streaming:
        return documents
    if len(documents) == 0:
        raise ValueError(f"data must hold text, got none in {len(dataset)} rows of {data}")
    if empty := len(dataset) - len(documents):
        logger.warning(f"{empty} of {len(dataset)} documents of {data} are left out: they hold no text")
    return documents


def split_documents(
    documents: Dataset | IterableDataset, held_out_fraction: float, seed: int
) -> tuple[Dataset, Dataset] | tuple[IterableDataset, IterableDataset]:
    """Split documents into those to train on and held-out documents.

    Of a dataset, at least one document is held out. A stream is not known as a whole, so whether a document is held out
    depends on a hash of its content. Copies are therefore treated alike, and possibly no document is held out.

    Raises:
        ValueError: the fraction is outside (0, 1), or the dataset has fewer than two documents.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction must be in (0, 1), got {held_out_fraction}")
    if isinstance(documents, IterableDataset):
        key = seed.to_bytes(8, "little")

        def is_held_out(row: Mapping[str, object]) -> bool:
            said = next(row[kind] for kind in COLUMNS if kind in row)
            digest = blake2b(repr(said).encode(), digest_size=8, key=key).digest()
            return int.from_bytes(digest, "little") < held_out_fraction * 2**64

        return documents.filter(lambda row: not is_held_out(row)), documents.filter(is_held_out)
    if len(documents) < 2:
        raise ValueError(f"held_out_fraction must be 0 where there are no two documents, got {held_out_fraction}")
    held_out = max(1, round(len(documents) * held_out_fraction))
    parts = documents.train_test_split(test_size=held_out, seed=seed)
    return parts["train"], parts["test"]


def pack(documents: Iterable[Sequence[int]], block_size: int) -> np.ndarray:
    """Concatenate documents and cut them into windows, int64 [windows, block_size]; the remainder is dropped."""
    tokens = np.fromiter(chain.from_iterable(documents), dtype=np.int64)
    windows = len(tokens) // block_size
    return tokens[: windows * block_size].reshape(windows, block_size)


def positions(documents: Sequence[Sequence[int]], block_size: int) -> np.ndarray:
    """Return the positions of ``pack``'s tokens in their documents; the first token of a window has position 0.

    >>> positions([[5, 6, 7], [8, 9, 5, 6, 7]], 4)
    array([[0, 1, 2, 0], [0, 1, 2, 3]])
    """
    begins = pack(([1] + [0] * (len(ids) - 1) for ids in documents if len(ids)), block_size)
    column = np.arange(block_size)
    return column - np.maximum.accumulate(begins * column, axis=1)


def pack_dataset(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    workers: int | None = None,
    *,
    separate: bool = False,
    vocab_size: int | None = None,
) -> Dataset | IterableDataset:
    """Pack documents from ``load_documents`` into windows, in a column ``input_ids`` (and ``labels``).

    Args:
        documents: the documents.
        tokenizer: the model's tokenizer.
        block_size: tokens per window.
        workers: number of processes that tokenise a dataset; None uses only this one.
        separate: whether documents in a window do not see each other. If so there is a column ``position_ids``, by
            which the model tells them apart.
        vocab_size: the model's vocabulary size, to check token ids; None skips the check.

    Raises:
        ValueError: messages have no chat template, token ids are outside the vocabulary, or all text of a dataset is
            shorter than one window. For a stream, all but the first are found only when it is read.
    """
    columns = documents.column_names or list(next(iter(documents), ()))  # a stream may not know its columns
    if MESSAGES in columns:
        check_template(tokenizer)
    names = ["input_ids"]
    names += ["labels"] if "labels" in columns else []
    names += ["position_ids"] if separate else []

    def windows(rows: Mapping[str, Sequence]) -> dict[str, np.ndarray]:
        ids, labels = documents_of(rows, tokenizer)
        packed = {"input_ids": pack(ids, block_size)}
        if labels is not None:
            packed["labels"] = pack(labels, block_size)
        if separate:
            packed["position_ids"] = positions(ids, block_size)
        if vocab_size is not None:
            check_ids("input_ids", packed["input_ids"], vocab_size)
            check_ids("labels", packed.get("labels", packed["input_ids"]), vocab_size, IGNORE_INDEX)
        return packed

    settings = {
        "batched": True, "batch_size": PACKED_TOGETHER, "remove_columns": columns,
        "features": Features({name: List(Value("int64")) for name in names}),
    }  # fmt: skip
    if isinstance(documents, IterableDataset):
        return documents.map(windows, **settings)
    settings |= {"num_proc": workers, "desc": f"Packing windows of {block_size} tokens"}
    packed = documents.map(windows, **settings)
    if len(packed) == 0:
        raise ValueError(f"block_size must be no longer than the text: less than {block_size} tokens")
    return packed


def collate_windows(windows: list[dict[str, Sequence[int]]]) -> dict[str, Tensor]:
    """Collate a batch of input_ids, labels and, if windows have them, position_ids; all int64 [B, block_size].

    Every token is a label unless windows have their own labels. If windows have ``anchors``, lists of the positions
    that think, they become int64 [B, A], padded with −1.
    """
    names = [name for name in ("input_ids", "labels", "position_ids") if name in windows[0]]
    batch = {name: torch.as_tensor(np.array([window[name] for window in windows])) for name in names}
    if "anchors" in windows[0]:
        most = max([1, *(len(window["anchors"]) for window in windows)])
        batch["anchors"] = torch.tensor(
            [[*window["anchors"]] + [-1] * (most - len(window["anchors"])) for window in windows]
        )
    return {"labels": batch["input_ids"]} | batch
