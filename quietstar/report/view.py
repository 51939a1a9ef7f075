"""The token view of a text: tokens shaded by their gain, with details of each."""

import math
from itertools import chain
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from quietstar.report import pieces
from quietstar.report.reading import Reading

SHADES = 4  # for gains and as many for losses
SCALES = [step * 10.0**power for power in range(-2, 3) for step in (1, 2, 3, 5)]  # gains of the strongest shade, nats
LISTED = 6  # number of listed tokens that gained or lost most


class Token(NamedTuple):
    """A token in the text."""

    text: str  # empty before the token that completes a character
    style: str  # classes of the page's style sheet
    gain: float | None = None  # None if there was no prediction


class TokenView(NamedTuple):
    """The page's data about tokens.

    ``data`` is for the script: ``strings``, and for every token of every block None or a row. A row has the name and
    the thought as indices into ``strings``, the thought's weight, log p without and with it, and the most likely tokens
    without and with it, each as index and log p. Numbers that are not finite are None.
    """

    blocks: list[list[Token]]
    scale: float  # gain of the strongest shade, nats
    most: list[tuple[int, Token]]  # tokens that gained most, with their places among the rows
    least: list[tuple[int, Token]]
    data: dict[str, list]


def token_view(
    tokenizer: PreTrainedTokenizerBase, reading: Reading, *, windows: int | None = None, joined: bool
) -> TokenView:
    """Create the token view of a reading.

    Args:
        tokenizer: the model's tokenizer.
        reading: the measurements.
        windows: show only this many windows. Default: all.
        joined: whether the windows are one text that was cut; if not, every window is a text of its own.
    """
    places = _places(reading.counted[:windows].tolist(), joined)
    tokens = reading.windows.tolist()
    texts = [[tokens[row][i] for row, i in block] for block in places]
    if joined:
        whole = iter(pieces.pieces(tokenizer, [*chain(*texts)]))
        shown = [[next(whole) for _ in text] for text in texts]
    else:
        shown = [pieces.pieces(tokenizer, text) for text in texts]

    gains = reading.gains.tolist()
    scale = _scale(reading.gains[reading.counted].abs().quantile(0.98).item())
    strings = _Strings(tokenizer)
    columns = _columns(reading)
    blocks, rows = [], []
    for block, block_pieces in zip(places, shown, strict=True):
        blocks.append([])
        for (row, i), piece in zip(block, block_pieces, strict=True):
            gain = gains[row][i - 1] if i > 0 else None
            blocks[-1].append(Token(pieces.visible(piece), _style(piece, gain, scale), gain))
            rows.append(None if gain is None else strings.row(tokens[row][i], columns, row, i - 1))
    order = [(place, token) for place, token in enumerate(chain(*blocks)) if _finite(token.gain) is not None]
    order = [item for item in order if _shade(item[1].gain, scale)]
    order.sort(key=lambda item: item[1].gain, reverse=True)
    return TokenView(
        blocks,
        scale,
        [item for item in order[:LISTED] if item[1].gain > 0],
        [item for item in order[: -LISTED - 1 : -1] if item[1].gain < 0],
        {"strings": strings.all, "rows": rows},
    )


def _places(counted: list[list[bool]], joined: bool) -> list[list[tuple[int, int]]]:
    """Return window and position of the tokens of every block."""
    blocks = []
    for row, which in enumerate(counted):
        first = [(row, 0)] if row == 0 or not joined else []
        blocks.append(first + [(row, i + 1) for i, counts in enumerate(which) if counts])
    return blocks


def _scale(gain: float) -> float:
    return next((scale for scale in SCALES if scale >= gain), SCALES[-1])


def _style(piece: str, gain: float | None, scale: float) -> str:
    """Return a token's style classes: its shade and the layout of its text."""
    styles = []
    if gain is not None and math.isfinite(gain):
        shade = _shade(gain, scale)
        styles += [f"{'up' if gain > 0 else 'down'}{shade}"] if shade else []
    elif gain is None:
        styles.append("first")
    if not piece:
        styles.append("part")
    elif "\n" in piece:
        styles.append("break")
    return " ".join(styles)


def _shade(gain: float, scale: float) -> int:
    return min(SHADES, round(SHADES * abs(gain) / scale))


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _columns(reading: Reading) -> tuple[list, ...]:
    """Return thoughts, weights, log p and the most likely tokens as nested lists: windows, then predictions."""
    own, likeliest = reading.own, reading.likeliest
    return tuple(
        column.tolist()
        for column in (
            own.thought_tokens[:, 0],
            own.mixing_weight,
            -own.base,
            -own.mixed,
            likeliest.base_tokens,
            likeliest.base_logprobs,
            likeliest.mixed_tokens[:, 0],
            likeliest.mixed_logprobs[:, 0],
        )
    )


class _Strings:
    """Unique names of tokens and texts of thoughts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.all: list[str] = []
        self.places: dict[object, int] = {}

    def place(self, what: int | tuple[int, ...]) -> int:
        """Return the index of a token's name or a thought's text."""
        if what not in self.places:
            self.places[what] = len(self.all)
            describe = pieces.thought if isinstance(what, tuple) else pieces.name
            self.all.append(describe(self.tokenizer, what))
        return self.places[what]

    def row(self, token: int, columns: tuple[list, ...], window: int, i: int) -> list[float | None]:
        thought, weight, before, after, *likeliest = (column[window][i] for column in columns)
        numbers = [_rounded(value) for value in (weight, before, after)]
        own = tuple(part for part in thought if part >= 0)
        row = [self.place(token), self.place(own), *numbers]
        for tokens, logprobs in (likeliest[:2], likeliest[2:]):
            for other, logprob in zip(tokens, logprobs, strict=True):
                row += [self.place(other), _rounded(logprob)]
        return row


def _rounded(number: float) -> float | None:
    number = _finite(number)
    return None if number is None else round(number, 4)
