"""The comparison of methods runs, and its page says what was measured."""

import json
import re
from pathlib import Path

import method_table
import methods
import pytest
import torch

from quietstar import QuietStarConfig

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
ALL = methods.METHODS | methods.STRESS


@pytest.mark.parametrize("name", ALL)
def test_fields_go_together(name):
    QuietStarConfig(**methods.THINKING | ALL[name].fields)


def test_runs_are_kept_and_replaced(tmp_path, capsys):
    path, names = tmp_path / "results.json", ["ordinary training", "VeriFree"]
    path.write_text(json.dumps({"runs": [{"method": name, "seed": seed} for seed in (0, 1) for name in names]}))
    methods.main(["--tiny", "--seeds", "1", "--methods", *names, "--output", str(path)])
    runs = json.loads(path.read_text())["runs"]
    assert [(run["method"], run["seed"]) for run in runs] == [(name, seed) for seed in (0, 1) for name in names]
    assert runs[:2] == [{"method": name, "seed": 0} for name in names]
    plain, thinking = runs[2:]
    assert "accuracy_with" not in plain
    assert thinking["fields"] == methods.METHODS["VeriFree"].fields
    assert {"accuracy_with", "accuracy_shuffled", "gain_other_tokens"} <= thinking.keys()
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"method"')]
    assert printed == runs[2:]


def test_thoughts_stand_where_a_token_is():
    input_ids = torch.tensor([[2, 7, 2, 2], [7, 7, 7, 7], [2, 2, 5, 7]])
    assert methods.positions_of(2, input_ids).tolist() == [[0, 2], [-1, -1], [0, 1]]


def test_table():
    runs = [
        {"method": "a", "seed": 0, "x": 0.5, "y": -1.0},
        {"method": "a", "seed": 1, "x": 0.3, "y": -2.0},
        {"method": "b", "seed": 0, "x": 0.25},
        {"method": "c", "seed": 0, "x": 0.0},
    ]
    columns = [method_table.Column("of x, %", "x", 100), method_table.Column("of y", "y", digits=2)]
    assert method_table.table(runs, ["b", "a", "not run"], columns).splitlines() == [
        "| | of x, % | of y | seeds |", "| --- | ---: | ---: | ---: |", "| b | 25.0 | – | 1 |",
        "| a | 40.0 ± 10.0 | −1.50 ± 0.50 | 2 |",
    ]  # fmt: skip


def test_tables_of_the_page_are_those_of_the_results():
    runs = json.loads(methods.RESULTS.read_text())["runs"]
    assert method_table.with_tables(PAGE, runs, list(methods.METHODS), list(methods.STRESS)) == PAGE


def test_results_are_of_the_methods_as_they_are():
    runs = json.loads(methods.RESULTS.read_text())["runs"]
    assert runs
    for run in runs:
        settings = json.loads(json.dumps(ALL[run["method"]].settings()))
        assert {name: run[name] for name in settings} == settings, run["method"]


@pytest.mark.parametrize("name", [*methods.METHODS, "stress"])
def test_the_page_has_every_configuration(name):
    heading = "## Collapse and its remedies" if name == "stress" else f"### {name}"
    section = re.split(r"^##", PAGE.split(f"\n{heading}\n")[1], flags=re.MULTILINE)[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    fields = eval(blocks[0], {"QuietStarConfig": dict}) if blocks else {}
    assert fields == ALL[name].fields


def test_the_page_has_every_remedy():
    rows = re.findall(r"^\| ([^|]+) \| `([^|]+)` \|$", PAGE, re.MULTILINE)
    assert {name: eval(f"dict({fields})") for name, fields in rows} == methods.REMEDIES


def test_shares_of_steps():
    assert methods.parts_of([(4, 1), (3, 2)], 7) == [(4, 1, 3), (3, 2, 4)]
