"""Text to train on, such as the sources of Python's standard library, and a tokenizer for it."""

import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from quietstar.training.data import load_documents, pack, tokenize

STANDARD_LIBRARY = "stdlib"
# Folders that are not always installed (tests), not part of the library (packages), or tables (encodings).
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
END_OF_TEXT = "<|endoftext|>"
TOKENIZED_TOGETHER = 32


def read_texts(source: str) -> list[str]:
    """Read the texts of a folder, a file, or Python's standard library.

    Args:
        source: "stdlib"; a folder, in which every file in UTF-8 that is not hidden is a text; or a file as accepted by
            ``quietstar train``, for example a text file, whose paragraphs are the texts.

    Raises:
        ValueError: there is nothing that can be read, or fewer than two texts.
    """
    path = Path(source)
    if source == STANDARD_LIBRARY:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in root.rglob("*.py") if LEFT_OUT.isdisjoint(file.relative_to(root).parts)]
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in sorted(files)]
    elif path.is_dir():
        files = [file for file in path.rglob("*") if not _hidden(file.relative_to(path)) and file.is_file()]
        texts = [text for file in sorted(files) if (text := _read(file)) is not None]
    else:
        documents = load_documents(source, text_column="text") if path.is_file() else None
        texts = documents["text"] if documents is not None and "text" in documents.column_names else []
    texts = [text for text in texts if text and not text.isspace()]
    if len(texts) < 2:
        raise ValueError(f"text must be {STANDARD_LIBRARY!r}, or a file or folder of two texts at least, got {source}")
    return texts


def _hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _read(file: Path) -> str | None:
    """Read the text of a file; None if it is not text."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def split_texts(texts: Sequence[str], seed: int, held_out_share: float) -> tuple[list[str], list[str]]:
    """Split texts, in an order given by the seed, into those to train on and at least one held-out text."""
    texts = list(texts)
    random.Random(seed).shuffle(texts)
    held_out = max(1, round(len(texts) * held_out_share))
    return texts[held_out:], texts[:held_out]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with ``vocabulary`` tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def windows_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, length: int, title: str) -> np.ndarray:
    """Cut texts into windows of tokens, int64 [windows, length].

    Raises:
        ValueError: there is too little text for one window.
    """
    groups = range(0, len(texts), TOKENIZED_TOGETHER)
    tokens: list[list[int]] = []
    for start in tqdm(groups, desc=title, unit="group"):
        tokens += tokenize(texts[start : start + TOKENIZED_TOGETHER], tokenizer)
    windows = pack(tokens, length)
    if len(windows) == 0:
        raise ValueError(f"text must have at least {length} tokens to train on and held out, got fewer: {title}")
    return windows
