"""The comparison of commits: cases run, tests come first, and a table says what is a difference."""

import commit_cases
import compare_commits
import pytest
import shapes
import torch


def test_table_says_what_is_a_difference():
    times = {
        "same": ([1.0, 2.0, 3.0], [1.1, 1.9, 3.0]),
        "fast": ([2.0, 2.2, 4.0], [1.0, 1.0, 2.0]),
        "slow": ([1.0] * 3, [2.0] * 3),
    }
    rows = compare_commits.table(times).splitlines()[2:]
    assert [row.split("|")[-2].strip() for row in rows] == ["no difference", "faster", "slower"]
    assert rows[1].startswith("| fast | 2.2e+03 ms | 1e+03 ms | 2.00 (2.00 … 2.10) |")


@pytest.mark.parametrize("op", compare_commits.TESTS)
def test_every_case_runs_and_every_op_has_tests(op, monkeypatch):
    small = {"rows": 4, "hidden_size": 8, "vocab_size": 64, "dtype": torch.float32}
    monkeypatch.setitem(shapes.LINEAR_CROSS_ENTROPY, "cpu", [shapes.HeadShape(**small)])
    monkeypatch.setitem(shapes.LINEAR_SAMPLE, "cpu", [shapes.HeadShape(**small)])
    monkeypatch.setitem(shapes.MIXING, "cpu", [shapes.LogitsShape(4, 64, torch.float32)])
    attention = shapes.ThoughtAttentionShape(1, 16, 2, 2, 1, 8, torch.float32, target=None)
    monkeypatch.setitem(shapes.THOUGHT_ATTENTION, "cpu", attention)
    monkeypatch.setattr(commit_cases, "DEVICE", "cpu")
    made = commit_cases.cases([op], "torch")
    assert made
    assert all(name.startswith(f"{op}, ") for name in made)
    for call in made.values():
        call()
    for file in compare_commits.TESTS[op]:
        assert (compare_commits.ROOT / "tests" / "ops" / file).exists()


def test_nothing_is_timed_when_tests_fail(monkeypatch, tmp_path, capsys):
    sites = {"base": (tmp_path, tmp_path), "the checkout": (tmp_path, tmp_path)}
    monkeypatch.setattr(compare_commits, "build", lambda base, folder: sites)
    monkeypatch.setattr(compare_commits, "passes", lambda tree, site, ops: False)
    monkeypatch.setattr(compare_commits, "measured", lambda *_: pytest.fail("was timed"))
    assert compare_commits.main(["base"]) == 1
    assert "the tests of base fail; nothing was timed" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["base", "--rounds", "1"], ["base", "--ops", "attention"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        compare_commits.main(arguments)


def test_an_unknown_commit_is_named(capsys):
    assert compare_commits.main(["no-such-commit"]) == 1
    assert "no-such-commit" in capsys.readouterr().err
