"""The run behind the table of docs/evaluation.md, with a few steps of a tiny model."""

import runpy
from pathlib import Path

from quietstar.quickstart.experiment import TINY

RUN = Path(__file__).parents[2] / "runs" / "where_to_think.py"


def test_the_run_measures_what_its_table_shows(capsys):
    run = runpy.run_path(str(RUN))
    results = [run["measured"](seed, TINY) for seed in (0, 1)]
    for result in results:
        always, learned = result["thinking_always"], result["thinking_as_learned"]
        assert 0 <= learned["share"] <= learned["share_at_0"] <= 1
        assert 0 <= always["accuracy"] <= 1
    lines = run["table"](results, "all tokens").splitlines()
    assert len(lines) == 2 + len(run["SHARES"])
    first = [result["curves"]["all tokens"]["learned"][0]["nll"] for result in results]
    assert f"| 0 | {sum(first) / 2:.3f} |" in lines[2]
