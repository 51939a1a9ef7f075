"""Conversion of a dataset's rows, which hold text, conversations or token ids, into tokens."""

from collections.abc import Mapping, Sequence

import numpy as np
from datasets import Features
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from quietstar.training.sources import DataError

TEXT, MESSAGES, TOKEN_IDS = COLUMNS = "text", "messages", "input_ids"  # kinds of content, and their default columns

_OF_TOKENS = ("attention_mask", "labels")  # columns that accompany token ids


def choose_column(features: Features, wanted: str | None) -> tuple[str, str]:
    """Return the column of the documents and its kind of content, one of ``COLUMNS``.

    Args:
        features: features of all columns.
        wanted: name of the column; None chooses the first of ``COLUMNS`` that exists.

    Raises:
        ValueError: the column does not exist or holds something else.
    """
    columns = ", ".join(map(repr, features))
    name = next((name for name in COLUMNS if name in features), None) if wanted is None else wanted
    if name is None:
        raise ValueError(f"text_column must be one of {columns}, got none of {', '.join(map(repr, COLUMNS))}")
    if name not in features:
        raise ValueError(f"text_column must be one of {columns}, got {name!r}")
    kind = _kind(features[name])
    if kind is None or (wanted is None and kind != name):
        expected = {TEXT: "text", MESSAGES: "chat messages", TOKEN_IDS: "token ids"}[name if wanted is None else TEXT]
        other = " (chat messages and token ids are taken too)" if wanted is not None else ""
        found = getattr(features[name], "dtype", features[name])
        raise ValueError(f"text_column must hold {expected}, got {found} in {name!r}{other}")
    return name, kind


def _kind(feature: object) -> str | None:
    """Return the kind of content of a ``datasets`` feature; None if it cannot be trained on."""
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        return TEXT
    item = getattr(feature, "feature", None)  # the element type of lists
    if isinstance(item, Mapping):
        return MESSAGES if {"role", "content"} <= set(item) else None
    if type(item).__name__ == "Json":  # messages with different fields
        return MESSAGES
    return TOKEN_IDS if str(getattr(item, "dtype", "")).startswith(("int", "uint")) else None


def of_tokens(features: Features) -> list[str]:
    """Return the columns that accompany token ids."""
    return [name for name in _OF_TOKENS if name in features]


def tokenize(texts: Sequence[str | None], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenise each non-empty text and append the end-of-text token, if the tokenizer has one."""
    texts = [text for text in texts if text]
    if not texts:
        return []
    end = tokenizer.eos_token_id
    documents = tokenizer(texts, verbose=False)["input_ids"]
    return [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in documents]


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer has a chat template, which conversations need.

    Raises:
        ValueError: it has none.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"tokenizer must have a chat template for messages, got none in {tokenizer.name_or_path or 'the tokenizer'}"
            ": set its chat_template and save it, or give text"
        )


def documents_of(
    rows: Mapping[str, Sequence], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Sequence[int]], list[Sequence[int]] | None]:
    """Return the token ids of the documents in ``rows``, and their labels if they have labels of their own.

    Text is tokenised by ``tokenize``. Conversations are formatted by the chat template, with nothing added. Token ids
    are used unchanged, without those that the attention mask excludes.

    Raises:
        DataError: the template does not accept the messages, or masks or labels have the wrong length.
    """
    if TEXT in rows:
        return tokenize(rows[TEXT], tokenizer), None
    if MESSAGES in rows:
        return [_conversation(messages, tokenizer) for messages in rows[MESSAGES]], None
    documents = [np.asarray(ids, dtype=np.int64) for ids in rows[TOKEN_IDS]]
    beside = {name: [np.asarray(row) for row in rows[name]] for name in _OF_TOKENS if name in rows}
    for name, column in beside.items():
        for ids, row in zip(documents, column, strict=True):
            if row.shape != ids.shape:
                raise DataError(f"{name} must be as long as input_ids, got {row.size} for {ids.size} tokens")
    labels = beside.get("labels")
    if "attention_mask" in beside:
        kept = [mask != 0 for mask in beside["attention_mask"]]
        documents = [ids[keep] for ids, keep in zip(documents, kept, strict=True)]
        labels = labels and [row[keep] for row, keep in zip(labels, kept, strict=True)]
    return documents, labels


def _conversation(messages: Sequence[Mapping], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise DataError(f"messages must have a role and a content each, got {messages}")
    # Arrow gives every message the fields of all messages, but templates test which fields exist. transformers 5.24
    # handles this.
    given = [{name: value for name, value in message.items() if value is not None} for message in messages]
    try:
        return tokenizer.apply_chat_template(given, tokenize=True, return_dict=False)
    except (TemplateError, TypeError, KeyError) as error:
        raise DataError(f"messages must suit the tokenizer's chat template, got {messages}: {error}") from error


def check_ids(name: str, ids: np.ndarray, vocab_size: int, ignore: int | None = None) -> None:
    """Check that token ids, of any shape, are in the model's vocabulary.

    Raises:
        DataError: an id is not.
    """
    outside = ids[((ids < 0) | (ids >= vocab_size)) & (True if ignore is None else ids != ignore)]
    if outside.size:
        raise DataError(
            f"{name} must be in [0, {vocab_size}), the model's vocabulary, got {outside[0]}: the tokens of another "
            "tokenizer?"
        )
