"""The quickstart's results as readable text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quietstar.quickstart.measures import THINK_ABOVE


def results_table(results: Mapping[str, Any]) -> str:
    """Format the content of ``results.json``: the measurements, and the controls if there are any."""
    kinds = {"without": "without thoughts", "with": "after a thought", "shuffled": "after another question's thought"}
    lines = [f"{'held-out questions':<44} {'answers right':>15}  {'nll of the answer':>17}"]
    lines += [_row(label, results, f"_{kind}") for kind, label in kinds.items()]
    lines += [_row(control["name"], control) for control in results.get("controls", [])]
    chance = 1 / results["people"]
    base, mixed, difference = (results[f"other_tokens_{name}"] for name in ("nll_without", "nll_with", "gain"))
    lines += [
        f"{len(results['questions'])} questions that no text answered; chance is {chance:.1%}, {-math.log(chance):.3f} "
        "nats; ± is the standard error",
        "",
        f"All other tokens of held-out text: nll {base:.4f} without, {mixed:.4f} after a thought, "
        f"gain {difference:+.4f} ± {results['other_tokens_gain_error']:.4f} nats",
        f"Weight of the thought: {results['mixing_weight_answers']:.2f} at answers, "
        f"{results['mixing_weight_other_tokens']:.2f} elsewhere",
        f"Thinking only where the prediction has more than {THINK_ABOVE:g} nats of entropy: "
        f"{results['accuracy_think_above_2']:.1%} right, a thought in front of {results['share_think_above_2']:.0%} "
        "of the tokens",
    ]
    return "\n".join(lines)


def _row(label: str, results: Mapping[str, Any], kind: str = "") -> str:
    accuracy, nll = results[f"accuracy{kind}"], results[f"nll{kind}"]
    errors = results[f"accuracy{kind}_error"], results[f"nll{kind}_error"]
    return f"{label:<44} {accuracy:>7.1%} ± {errors[0]:.1%}  {nll:>9.3f} ± {errors[1]:.3f}"


def question_lines(questions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format one line per question: prompt, thought and the model's answer."""
    width, thought_width = (max(len(str(question[name])) for question in questions) for name in ("prompt", "thought"))
    return [
        f"{question['prompt']:<{width}}  thought: {question['thought']:<{thought_width}}  -> {question['said']}"
        + ("" if question["said"] == question["answer"] else f" (wrong: {question['answer']})")
        for question in questions
    ]
