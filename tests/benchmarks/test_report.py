"""The report says what the results say, and what it cannot say."""

import copy
import json
import sys
from pathlib import Path

import pytest
import report

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
NUMBERS = {
    "median_ms": 50.0, "median_ratio": 1.0, "spread": 0.1, "best_ms": 40.0, "best_ratio": 1.0, "promised_ratio": None,
    "peak_mib": 100.0, "gflop_per_s": 50.0, "matmul_fraction": 0.25, "gb_per_s": 3.0, "copy_fraction": 0.125,
}  # fmt: skip
PEER = NUMBERS | {"median_ms": 2500.0, "median_ratio": 50.0, "promised_ratio": 9, "peak_mib": 300.0, "spread": None}
RESULTS = {
    "format": report.FORMAT,
    "command": "pytest benchmarks --benchmark-only",
    "datetime": "2026-01-02T03:04:05+00:00",
    "machine_info": {
        "device": "A Processor", "kind": "cpu", "threads": 2, "python": "3.11.7", "quietstar": "0.1.0",
        "torch": "2.13.0", "triton": None, "transformers": "5.23.0",
    },
    "commit_info": {"id": "0123456789abcdef", "dirty": False},
    "not_run": {"mixing[triton]": "needs a GPU", "mixing[cuda]": "needs a GPU"},
    "benchmarks": [
        {
            "name": "bench_mixing[torch]",
            "extra_info": {
                "shape": {"rows": "8", "vocab_size": "32", "dtype": "torch.float32", "target": "9"},
                "candidates": {"ours": NUMBERS, "plain": PEER},
                "missing": {"absent|peer": "ImportError: none"},
                "best_peer": "plain",
                "best_peer_ratio": 50.0,
            },
        },
        {
            "name": "bench_mixing_over[rows]",
            "extra_info": {
                "shape": {},
                "missing": {},
                "sweep": {
                    "variable": "rows",
                    "sizes": [1, 2, 4],
                    "candidates": {
                        "ours": {
                            "median_ms": [1.0, 2.0, 4.0], "peak_mib": [1.0, 1.0, 1.0],
                            "time_exponent": 1.0, "memory_exponent": 0.0,
                        },
                        "plain": {
                            "median_ms": [1.0, 4.0, None], "peak_mib": [1.0, 2.0, None],
                            "time_exponent": 2.0, "memory_exponent": None,
                        },
                    },
                    "ideal": {
                        "work": [1, 2, 4], "results": [8, 8, 8], "time_exponent": 1.0, "memory_exponent": 0.0,
                    },
                },
            },
        },
    ],
}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    return path


def test_every_number_stands_in_its_row():
    text = report.document({"results.json": RESULTS})
    for line in (
        "### A Processor, 2 threads",
        "quietstar 0.1.0, torch 2.13.0, transformers 5.23.0, Python 3.11.7; 2026-01-02, commit 01234567; "
        "`pytest benchmarks --benchmark-only`; [JSON](results.json).",
        "| benchmark | shape | ours | best peer | its time | ratio | promise | speed of ours | peak memory |",
        "| `mixing[torch]` | rows 8, vocab size 32, float32 | 50 ms ± 5% | plain | 2.50 s  | 50.00 "
        "| plain: 50.00, ≥ 9 promised | 50 GFLOP/s, 25% of matmul | 100 / 300 MiB |",
        "| `mixing_over[rows]` | rows = 1 … 4 | ours | size^1.00 | size^1.00 | size^0.00 | size^0.00 | 4 ms, 1 MiB |",
        "| `mixing_over[rows]` | rows = 1 … 4 | plain | size^2.00 | size^1.00 | unknown | size^0.00 | does not run |",
        "- Missing peer: absent|peer (`ImportError: none`) in `mixing[torch]`.",
        "- Not run: `mixing[triton]`, `mixing[cuda]` (`needs a GPU`).",
        "| `mixing[torch]` | plain | 2.50 s |  | 50.00 | 1.00 | 50 GFLOP/s, 25% of matmul; 3 GB/s, 12% of copy | 300 |",
    ):
        assert line in text.splitlines(), text


def test_runs_of_a_device_stand_under_one_heading():
    other = copy.deepcopy(RESULTS)
    other["machine_info"]["device"] = "Another"
    text = report.document({"a.json": RESULTS, "b.json": other, "c.json": RESULTS})
    marks = "### A Processor, 2 threads", "[JSON](a.json)", "[JSON](c.json)", "### Another, 2 threads", "[JSON](b.json)"
    assert [text.count(mark) for mark in marks] == [1] * 5
    assert sorted(marks, key=text.index) == list(marks)


def test_bars_do_not_cut_cells_and_empty_columns_go():
    assert report.table(("a", "b", "c"), [("x|y", "", "1"), ("", "", "2")]) == (
        "| a | c |\n| --- | --- |\n| x\\|y | 1 |\n|  | 2 |"
    )


def test_gpus_have_no_threads_and_changes_are_said():
    on_gpu = copy.deepcopy(RESULTS)
    on_gpu["machine_info"] |= {"kind": "cuda", "device": "A GPU"}
    on_gpu["commit_info"]["dirty"] = True
    text = report.document({"gpu.json": on_gpu})
    assert "### A GPU\n" in text
    assert "commit 01234567 with uncommitted changes" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps({"format": report.FORMAT, "benchmarks": []}),
            "it has no machine_info, commit_info, datetime, command",
        ),
        (json.dumps({"benchmarks": []}), "it has no format number: measure again"),
        (json.dumps(RESULTS | {"format": report.FORMAT + 1}), f"its format is {report.FORMAT + 1}: measure again"),
        ("[]", "it has no format number"),
        ("{", "not JSON"),
        (None, "No such file"),
    ],
)
def test_files_that_are_not_results_are_named_and_the_others_reported(content, message, results, tmp_path, capsys):
    bad = tmp_path / "bad.json"
    if content is not None:
        bad.write_text(content)
    assert report.main([str(bad), str(results)]) == 1
    printed = capsys.readouterr()
    assert f"report.py: {bad}: " in printed.err
    assert message in printed.err
    assert "### A Processor" in printed.out


def test_readme_section_is_replaced_and_nothing_else(results, tmp_path, capsys):
    readme = tmp_path / "docs" / "README.md"
    readme.parent.mkdir()
    readme.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    for _ in range(2):  # a second time changes nothing
        assert report.main([str(results), "--readme", str(readme)]) == 0
        wanted = report.document({"../results.json": RESULTS})
        assert readme.read_text() == f"before\n\n{report.BEGIN}\n{wanted}\n{report.END}\n\nafter\n"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["", "{BEGIN}", "{END} {BEGIN}", "{BEGIN} {BEGIN} {END}"])
def test_readme_without_markers_stays_as_it_is(text, results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(before := text.format(BEGIN=report.BEGIN, END=report.END))
    assert report.main([str(results), "--readme", str(readme)]) == 1
    assert f"{readme}: {report.BEGIN} and, behind it, {report.END} expected" in capsys.readouterr().err
    assert readme.read_text() == before


def test_readme_keeps_its_results_if_a_file_is_bad(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(before := f"{report.BEGIN}\nold\n{report.END}\n")
    assert report.main([str(results), str(tmp_path / "none.json"), "--readme", str(readme)]) == 1
    assert readme.read_text() == before


def test_plots(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert report.main([str(results), "--plots", str(tmp_path / "plots")]) == 0
    [picture] = (tmp_path / "plots").iterdir()
    assert picture.name == "results-mixing_over-rows.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().err


def test_without_matplotlib_there_are_tables_and_a_reason(results, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.main([str(results), "--plots", str(tmp_path / "plots")]) == 1
    printed = capsys.readouterr()
    assert "plots need matplotlib (pip install '.[bench]')" in printed.err
    assert "### A Processor" in printed.out


def test_readme_shows_the_committed_results():
    readme = (ROOT / "README.md").read_text()
    if report.BEGIN not in readme:
        pytest.skip("the README has no place for results yet")
    shown = readme.partition(report.BEGIN)[2].partition(report.END)[0]
    files = {path.relative_to(ROOT).as_posix(): report.load(path) for path in COMMITTED}
    assert shown == f"\n{report.document(files)}\n", (
        "README.md is not what `python benchmarks/report.py benchmarks/results/*.json --readme README.md` makes"
    )
