"""The page about a text: the gain of thoughts on it, next to controls that could explain it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.evaluation import Mean, gain, gain_by_difficulty, token_mean
from quietstar.report import plots
from quietstar.report.page import Card, Page, Row, Table
from quietstar.report.reading import Reading
from quietstar.report.view import token_view

TRAINER_STATE = "trainer_state.json"  # written by the Trainer into a folder
PARTS = 10  # number of parts into which tokens are divided by difficulty
SURE = 2  # standard errors from which a gain is significant
NOTICEABLE = 0.0005  # nats per token from which a gain is worth mentioning
OWN_DIFFICULTY = (
    "How hard a token is says the model's own prediction without a thought, the one that is compared. That flatters "
    "the thoughts on the hardest tokens; a model from before Quiet-STaR (--base) would not."
)
OTHER_DIFFICULTY = (
    "How hard a token is says the model from before Quiet-STaR, so that no prediction here chooses its own."
)


class Source(NamedTuple):
    """Facts about the model and the text besides the measurements."""

    title: str
    text_notes: Sequence[str]
    thought_length: int  # that the model was trained with
    difficulty: Tensor | None  # [windows, L−1], difficulty of tokens according to another model, if there is one
    history: Sequence[Mapping[str, float]]  # logs of the training
    made: Sequence[tuple[str, str]]


def text_page(
    tokenizer: PreTrainedTokenizerBase, reading: Reading, source: Source, *, joined: bool, shown: int | None = None
) -> Page:  # fmt: skip
    """Create the page for a reading.

    Args:
        tokenizer: the model's tokenizer.
        reading: the measurements.
        source: facts about model and text.
        joined: whether the windows are one text that was cut.
        shown: how many windows to show token by token. Default: all.
    """
    own, counted = gain(reading.own, reading.counted), reading.counted
    without = own.base.value
    rows = [Row("without thoughts", [number(without), "–"])]
    kinds = {
        "after its own thoughts": reading.own,
        "… by the thought's prediction alone": reading.own._replace(mixed=reading.own.thought),
        "after thoughts of other places (shuffled)": reading.shuffled,
        "after random tokens for thoughts": reading.random,
    } | {f"after thoughts of {length} tokens": nll for length, nll in reading.lengths.items()}
    for name, nll in kinds.items():
        measured = gain(nll, counted)
        rows.append(Row(name, [number(measured.mixed.value), with_error(measured.gain)], main=nll is reading.own))
    shuffled = gain(reading.shuffled, counted).gain
    windows = len(reading.windows)
    table = Table(
        ["all tokens, nats per token", "nll", "gain"],
        rows,
        f"{own.tokens:,} tokens. "
        + (f"± is the standard error over {windows} windows." if windows > 1 else "No error: there is one window."),
    )
    cards = [
        Card(number(without, 3), "nats per token without thoughts"),
        Card(number(own.mixed.value, 3), "after its own thoughts"),
        Card(signed(own.gain.value, 3), "gained, nats per token", tone(own.gain)),
        Card(signed(shuffled.value, 3), "gained after thoughts of other places"),
    ]
    return Page(
        title=source.title,
        lead=[verdict(own.gain, token_mean(reading.shuffled.mixed - reading.own.mixed, counted))],
        cards=cards,
        table=table,
        text_notes=source.text_notes,
        view=token_view(tokenizer, reading, windows=shown, joined=joined),
        figures=figures(reading, source.difficulty, source.history, _staircase(reading, source.thought_length)),
        made=source.made,
    )


def verdict(own: Mean, over_shuffled: Mean) -> str:
    """State what can be concluded from the numbers and what cannot.

    Args:
        own: gain of the model's own thoughts.
        over_shuffled: how much more they gain than shuffled ones.
    """
    changed = f"With its own thoughts the model predicts this text {abs(own.value):.4f} nats per token "
    changed += "better" if own.value > 0 else "worse"
    if math.isnan(own.error):
        return f"{changed}. One window of text gives no standard error: an observation, not a finding."
    if not _changes(own):
        return (
            f"Its thoughts changed nothing here to speak of: {with_error(own)} nats per token. After a short training, "
            "on text whose steps the model never saw written out, that is what to expect."
        )
    if own.value < 0:
        return f"{changed} (± {own.error:.4f}): here they do harm."
    if over_shuffled.value > SURE * over_shuffled.error:
        return (
            f"{changed} (± {own.error:.4f}). What they say matters: the same thoughts, exchanged between places, gain "
            f"{over_shuffled.value:.4f} nats less."
        )
    return (
        f"{changed} (± {own.error:.4f}). But it is not what they say: the same thoughts, exchanged between places, "
        "gain as much within the error."
    )


def figures(
    reading: Reading, difficulty: Tensor | None, history: Sequence[Mapping[str, float]], staircase: plots.Figure | None
) -> list[plots.Figure]:  # fmt: skip
    """Return the figures for which there is data; ``difficulty`` and ``history`` are as in ``Source``."""
    counted, own = reading.counted, gain(reading.own, reading.counted)
    deciles = None
    if own.tokens >= 2 * PARTS:
        before, note = (reading.own.base, OWN_DIFFICULTY) if difficulty is None else (difficulty, OTHER_DIFFICULTY)
        deciles = plots.deciles(gain_by_difficulty(reading.own, before, PARTS, counted), note)
    weights = plots.weights(
        reading.own.mixing_weight[counted].float().cpu().numpy(),
        f"0 is the prediction without the thought, 1 the thought's alone; mean {number(own.mixing_weight.value, 3)}.",
    )
    curves = plots.curves(history, "On the text it was trained on; every point is the mean since the one before.")
    return [figure for figure in (deciles, staircase, weights, curves) if figure is not None]


def _staircase(reading: Reading, own: int) -> plots.Figure | None:
    """Plot the gain by thought length, if lengths other than the model's ``own`` were measured."""
    if not reading.lengths:
        return None
    measured = sorted((reading.lengths | {own: reading.own}).items())
    values, errors = zip(*(gain(nll, reading.counted).gain for _, nll in measured), strict=True)
    note = f"One model, trained with thoughts of {own} tokens, measured with others too."
    return plots.staircase([length for length, _ in measured], values, errors, "gain (nats)", own, note)


def training_history(model: str) -> list[dict[str, float]]:
    """Return the trainer's logs, if its state is in the model's folder or in a checkpoint there; else an empty list."""
    folder = Path(model)
    states = [folder, *sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, reverse=True)]
    for path in (state / TRAINER_STATE for state in states):
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8")).get("log_history", [])
    return []


def number(value: float, digits: int = 4) -> str:
    """Format a number with a typographic minus sign, without one for zero."""
    return f"{value:z.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 4) -> str:
    """Format a number with a plus or minus sign, without one for zero."""
    return f"{value:+z.{digits}f}".replace("-", "−") if round(value, digits) else number(0, digits)


def with_error(mean: Mean) -> str:
    """Format a gain with its standard error, if there is one."""
    return signed(mean.value) if math.isnan(mean.error) else f"{signed(mean.value)} ± {mean.error:.4f}"


def _changes(mean: Mean) -> bool:
    """Whether a gain is significant given its error, and large enough to mention."""
    return abs(mean.value) > max(SURE * mean.error, NOTICEABLE)


def tone(mean: Mean) -> str:
    """Return the tone of the card that shows a gain."""
    if math.isnan(mean.error) or not _changes(mean):
        return ""
    return "up" if mean.value > 0 else "down"
