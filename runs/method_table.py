"""The tables of docs/methods.md from the results of runs/methods.py: means over seeds and their standard errors."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

NOTHING = "–"


class Column(NamedTuple):
    """A measure of the results, times ``factor``."""

    title: str
    name: str
    factor: float = 1.0
    digits: int = 1


_ACCURACY = [
    Column("after a thought, %", "accuracy_with", 100),
    Column("at once, %", "accuracy_without", 100),
    Column("after another's thought, %", "accuracy_shuffled", 100),
]
METHOD_COLUMNS = [
    *_ACCURACY,
    Column("gain on other tokens, nats", "gain_other_tokens", digits=3),
    Column("seconds", "seconds", digits=0),
]
STRESS_COLUMNS = [
    *_ACCURACY,
    Column("thoughts that name the steps, %", "thoughts_that_name_the_steps", 100),
    Column("entropy, nats", "thought_entropy", digits=2),
]


def table(runs: Sequence[dict[str, Any]], methods: Sequence[str], columns: Sequence[Column]) -> str:
    """A table in Markdown, one row per method; without one where no seed has the measure."""
    lines = ["| | " + " | ".join(column.title for column in columns) + " | seeds |"]
    lines.append("| --- |" + " ---: |" * (len(columns) + 1))
    for method in methods:
        own = [each for each in runs if each["method"] == method]
        if own:
            lines.append(f"| {method} | " + " | ".join(_cell(own, column) for column in columns) + f" | {len(own)} |")
    return "\n".join(lines)


def _cell(runs: Sequence[dict[str, Any]], column: Column) -> str:
    values = [each[column.name] * column.factor for each in runs if column.name in each]
    if not values:
        return NOTHING
    value = round(mean(values), column.digits) + 0.0  # no −0
    text = f"{value:.{column.digits}f}".replace("-", "−")  # a hyphen would break between lines
    if len(values) < 2:
        return text
    return f"{text} ± {stdev(values) / math.sqrt(len(values)):.{column.digits}f}"


def with_tables(page: str, runs: Sequence[dict[str, Any]], methods: Sequence[str], stress: Sequence[str]) -> str:
    """The text of a page with its two tables as the results are."""
    tables = {"methods": table(runs, methods, METHOD_COLUMNS), "stress": table(runs, stress, STRESS_COLUMNS)}
    for name, new in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n{new}\n{end}{after}"
    return page


def write_tables(page: Path, results: Path, methods: Sequence[str], stress: Sequence[str]) -> None:
    """Bring the tables of a page up to date."""
    runs = json.loads(results.read_text(encoding="utf-8"))["runs"]
    page.write_text(with_tables(page.read_text(encoding="utf-8"), runs, methods, stress), encoding="utf-8")
