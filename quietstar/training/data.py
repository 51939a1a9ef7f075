"""From text to windows of tokens.

A row of a JSON Lines, CSV or Parquet file or of a dataset is a document, and so is a paragraph (what blank lines
separate) of a text file. Text is tokenised with the tokenizer's special tokens and ended by its end-of-text token where
it has one; documents may also be conversations or token ids (``quietstar.training.rows``). They are put one behind
the other and cut into windows of equal length. There is no padding: the tail that fills no window is dropped, once for
every ``PACKED_TOGETHER`` documents.
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
_LOOKED_AT = 100  # rows of a stream that does not say what is in its columns


def load_documents(
    data: str, config: str | None = None, split: str = "train", text_column: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """Documents in a column ``text``, ``messages`` or ``input_ids``, with ``labels`` beside token ids that have some.

    Rows without text are left out, and their number is said where it is known.

    Args:
        data: a text, JSON Lines, CSV or Parquet file, compressed or not; a pattern of such files; the name of a
            dataset; or a folder with one (of such files, or saved by ``save_to_disk``).
        config, split: which part of a dataset; a file has no configuration and the one split "train".
        text_column: where the documents are: text, chat messages or lists of token ids; a text file has no columns.
            Default: ``text``, ``messages`` or ``input_ids``, the first of them that is there, with what it says.
        streaming: read while training, and never all of it.

    Raises:
        ValueError: no such file, an empty or broken one, no such column or one without text.
    """
    dataset = read(data, config, split, streaming)
    with explained(data):
        features = dataset.features or Dataset.from_list(list(dataset.take(_LOOKED_AT))).features
    column, kind = choose_column(features, None if dataset.info.builder_name == "text" else text_column)
    beside = of_tokens(features) if kind == TOKEN_IDS else []
    dataset = dataset.select_columns([column, *beside])
    if column != kind:
        dataset = dataset.rename_column(column, kind)
    with explained(data):  # the bytes are decoded only here
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
    """Documents to train on, and held-out documents.

    Of a dataset at least one document is held out. A stream is not known as a whole: there a document is held out by a
    hash of what it says, so that copies of it are too, and none may be.

    Raises:
        ValueError: a fraction outside (0, 1), or a dataset of fewer than two documents.
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
    """Windows of the documents one behind the other, int64 [windows, block_size]; the tail is dropped."""
    tokens = np.fromiter(chain.from_iterable(documents), dtype=np.int64)
    windows = len(tokens) // block_size
    return tokens[: windows * block_size].reshape(windows, block_size)


def positions(documents: Sequence[Sequence[int]], block_size: int) -> np.ndarray:
    """Positions of the tokens of ``pack`` within their documents; what a window begins with counts from 0.

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
    """Windows in a column ``input_ids`` (and ``labels``) of documents from ``load_documents``.

    Args:
        workers: processes that tokenise a dataset; None for this one.
        separate: whether documents in a window see nothing of each other: a column ``position_ids``, by which the
            model tells them apart.
        vocab_size: of the model; None does not compare.

    Raises:
        ValueError: no chat template for messages; token ids outside the vocabulary; or all text of a dataset together
            is shorter than one window. Of a stream all but the first shows when it is read.
    """
    columns = documents.column_names or list(next(iter(documents), ()))  # a stream may not say
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
    """A batch: input_ids, labels and, where windows have them, position_ids; int64 [B, block_size].

    Every token is a label, unless windows have labels of their own. Where windows have ``anchors``, lists of the
    positions that think, they are int64 [B, A], −1 behind shorter lists.
    """
    names = [name for name in ("input_ids", "labels", "position_ids") if name in windows[0]]
    batch = {name: torch.as_tensor(np.array([window[name] for window in windows])) for name in names}
    if "anchors" in windows[0]:
        most = max([1, *(len(window["anchors"]) for window in windows)])
        batch["anchors"] = torch.tensor(
            [[*window["anchors"]] + [-1] * (most - len(window["anchors"])) for window in windows]
        )
    return {"labels": batch["input_ids"]} | batch
