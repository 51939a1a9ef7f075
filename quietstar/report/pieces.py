"""Readable tokens: the text that each token adds, and its name on its own."""

import unicodedata
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

REPLACEMENT = "\ufffd"  # result of decoding bytes that are not a whole character
MOST_BYTES = 4  # largest number of bytes of a character in UTF-8
# Control characters that reorder the text around them or end its line.
_INVISIBLE = {"Cc", "Zl", "Zp"}
_REORDERING = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
_ONE_LINE = str.maketrans({"\n": "↵", "\t": "⇥"})
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """Return the text that each token adds.

    A token that ends within a character adds nothing of it; the token that completes it adds the whole character.
    """
    result = [""] * len(tokens)

    def apart(middle: int, end: int) -> str:
        return decode(tokenizer, tokens[known:middle]) + decode(tokenizer, tokens[middle:end])

    known = read = 0  # text up to ``read`` is written; decoding starts at ``known`` to get the spaces before it right
    for end in range(1, len(tokens) + 1):
        text, complete = decode(tokenizer, tokens[known:end]), end
        if text.endswith(REPLACEMENT) and end < len(tokens):
            if end - read < MOST_BYTES:
                continue
            # No character is this long, so the replacement character is part of the text itself.
            complete = next((i for i in range(read + 1, end) if text == apart(i, end)), end)
        before = decode(tokenizer, tokens[known:read])
        result[complete - 1] = decode(tokenizer, tokens[known:complete])[len(before) :]
        known, read = read, complete
    return result


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Decode tokens exactly, without cleaning up the text."""
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return a token's name: its text with visible spaces, or its bytes if it is part of a character."""
    text = decode(tokenizer, [token])
    raw = tokenizer.convert_ids_to_tokens(token) or f"#{token}"
    if REPLACEMENT in text and all(character in _BYTES for character in raw):
        return f"‹{' '.join(f'{_BYTES[character]:02X}' for character in raw)}›"
    if not text or REPLACEMENT in text:
        return visible(raw, one_line=True)
    inner = text.strip(" ")
    left = len(text) - len(text.lstrip(" "))
    right = len(text) - left - len(inner)
    return "␣" * left + visible(inner, one_line=True) + "␣" * right


def thought(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of a thought, token by token if it contains parts of characters."""
    if not len(tokens):
        return "(nothing)"
    text = decode(tokenizer, tokens)
    if REPLACEMENT in text:
        return " ".join(name(tokenizer, token) for token in tokens)
    return visible(text, one_line=True)


def visible(text: str, one_line: bool = False) -> str:
    """Make control characters visible, so that they reorder nothing; with ``one_line``, also tabs and line breaks."""
    return "".join(map(_visible, text.translate(_ONE_LINE) if one_line else text))


def _visible(character: str) -> str:
    if character in "\n\t":
        return character
    if character in _REORDERING or unicodedata.category(character) in _INVISIBLE:
        return f"‹U+{ord(character):04X}›"
    return character
