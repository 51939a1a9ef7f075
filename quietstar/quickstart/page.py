"""The quickstart's page: answers with and without thoughts, and text token by token."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.quickstart.controls import LENGTHS, OTHER_LENGTH
from quietstar.quickstart.measures import THINK_ABOVE
from quietstar.report import plots
from quietstar.report.page import Card, Page, Question, Row, Table
from quietstar.report.reading import Reading
from quietstar.report.text_page import figures, number, signed
from quietstar.report.view import token_view

SHOWN = 8  # number of questions, and of windows of text
KINDS = {"without": "without thoughts", "with": "after a thought", "shuffled": "after another question's thought"}


def world_page(
    tokenizer: PreTrainedTokenizerBase, results: Mapping[str, Any], reading: Reading, difficulty: Tensor,
    history: Sequence[Mapping[str, float]], made: Sequence[tuple[str, str]],
) -> Page:  # fmt: skip
    """Create the page of the quickstart's results.

    Args:
        tokenizer: the model's tokenizer.
        results: the content of ``results.json``.
        reading: measurements of windows of held-out text.
        difficulty: [windows, L−1], the base model's nll there.
        history: logs of the training of Quiet-STaR.
        made: how the page was made.
    """
    questions, chance = results["questions"], 1 / results["people"]
    right = {kind: percent(results[f"accuracy_{kind}"]) for kind in KINDS}
    rows = [_row(label, results, f"_{kind}", main=kind == "with") for kind, label in KINDS.items()]
    rows += [_row(control["name"], control) for control in results.get("controls", [])]
    return Page(
        title="A small model that thinks before it answers",
        lead=[
            f"A Mistral of one layer read about {results['people']} people: who is whose boss, friend, rival. "
            f"Questions chain {results['hops']} of these relations, more than one layer can look up at once. "
            "Quiet-STaR then trained it on text that never says a step in between.",
            f"Of {len(questions)} questions that no text answered it gets {right['without']} right at once and "
            f"{right['with']} after a thought of {results['thought_length']} tokens; after the thought of another "
            f"question {right['shuffled']}.",
        ],
        cards=[
            Card(right["without"], "right without thoughts"),
            Card(right["with"], "right after a thought", "up" if _helps(results) else ""),
            Card(right["shuffled"], "right after another question's thought"),
            Card(percent(chance), "right by chance"),
        ],
        table=Table(["held-out questions", "right", "nll of the answer"], rows, _note(results, chance)),
        questions=[
            Question(question["prompt"], question["thought"], question["said"], question["said"] == question["answer"])
            for question in questions[:SHOWN]
        ],
        text_notes=[
            f"{len(reading.windows[:SHOWN])} windows of held-out text. Only answers to questions need a thought; names "
            "that begin a question can only be guessed."
        ],
        view=token_view(tokenizer, reading, windows=SHOWN, joined=False),
        figures=figures(reading, difficulty, history, _staircase(results)),
        made=made,
    )


def percent(share: float) -> str:
    """Format a share in per cent with one decimal, or without for 100 %."""
    return "100 %" if share == 1 else f"{share:.1%}".replace("%", " %")


def _helps(results: Mapping[str, Any]) -> bool:
    """Whether more answers are right after a thought than without, by more than two standard errors."""
    names = [f"accuracy_{kind}" for kind in ("with", "without")]
    after, before = (results[name] for name in names)
    return after - before > 2 * math.hypot(*(results[f"{name}_error"] for name in names))


def _row(label: str, results: Mapping[str, Any], kind: str = "", main: bool = False) -> Row:
    accuracy, error = results[f"accuracy{kind}"], results[f"accuracy{kind}_error"]
    nll, nll_error = results[f"nll{kind}"], results[f"nll{kind}_error"]
    cells = [f"{percent(accuracy)} ± {100 * error:.1f}", f"{nll:.3f} ± {nll_error:.3f}"]
    return Row(label, cells, share=accuracy, main=main)


def _note(results: Mapping[str, Any], chance: float) -> str:
    return (
        f"{len(results['questions'])} questions; ± is the standard error, in points and in nats. Chance is "
        f"{percent(chance)}, {-math.log(chance):.3f} nats. All other tokens of held-out text: "
        f"{number(results['other_tokens_nll_without'])} nats without, {number(results['other_tokens_nll_with'])} after "
        f"a thought, gain {signed(results['other_tokens_gain'])} ± {results['other_tokens_gain_error']:.4f}. Thinking "
        f"only where the prediction has more than {THINK_ABOVE:g} nats of entropy: "
        f"{percent(results['accuracy_think_above_2'])} right, a thought in front of "
        f"{percent(results['share_think_above_2'])} of the tokens."
    )


def _staircase(results: Mapping[str, Any]) -> plots.Figure | None:
    """Plot right answers by thought length, each from its own training; None without the controls."""
    own = results["thought_length"]
    rows = {control["name"]: control for control in results.get("controls", [])}
    measured = {length: rows[name] for length in LENGTHS if (name := OTHER_LENGTH.format(length)) in rows}
    if not measured:
        return None
    points = {k: (row["accuracy"], row["accuracy_error"]) for k, row in measured.items()}
    points = dict(sorted((points | {own: (results["accuracy_with"], results["accuracy_with_error"])}).items()))
    values, errors = ([100 * value for value in column] for column in zip(*points.values(), strict=True))
    note = f"A training for each length. {results['hops']} relations have {results['hops'] - 1} people in between."
    return plots.staircase(list(points), values, errors, "answers right (%)", own, note)
