"""The text every Python carries: the source files of its standard library, and a tokenizer trained on them."""

import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from quietstar.training.data import pack, tokenize

# Not everywhere installed (tests), not of the library (packages), or tables rather than text (encodings).
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
END_OF_TEXT = "<|endoftext|>"
TOKENIZED_TOGETHER = 32


def standard_library(seed: int, held_out_share: float) -> tuple[list[str], list[str]]:
    """The source files to train on and the held-out ones, in an order that the seed decides."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in root.rglob("*.py") if LEFT_OUT.isdisjoint(file.relative_to(root).parts))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    texts = [text for text in texts if text]
    random.Random(seed).shuffle(texts)
    held_out = max(1, round(len(texts) * held_out_share))
    return texts[held_out:], texts[:held_out]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocabulary`` tokens."""
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
    """Windows of tokens, int64 [windows, length]."""
    groups = range(0, len(texts), TOKENIZED_TOGETHER)
    tokens: list[list[int]] = []
    for start in tqdm(groups, desc=title, unit="group"):
        tokens += tokenize(texts[start : start + TOKENIZED_TOGETHER], tokenizer)
    return pack(tokens, length)
