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
    text = "\n".join(report.documents({"results.json": RESULTS}).values())
    for line in (
        "# A Processor, 2 threads",
        "quietstar 0.1.0, torch 2.13.0, transformers 5.23.0, Python 3.11.7; 2026-01-02, commit 01234567; "
        "`pytest benchmarks --benchmark-only`; `results.json`.",
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


def test_runs_of_a_device_stand_on_one_page():
    other = copy.deepcopy(RESULTS)
    other["machine_info"]["device"] = "Another"
    pages = report.documents({"a.json": RESULTS, "b.json": other, "c.json": RESULTS})
    assert list(pages) == ["A Processor, 2 threads", "Another, 2 threads"]
    for page, sources in zip(pages.values(), ({"a.json", "c.json"}, {"b.json"}), strict=True):
        assert {source for source in ("a.json", "b.json", "c.json") if f"`{source}`." in page} == sources


def test_bars_do_not_cut_cells_and_empty_columns_go():
    assert report.table(("a", "b", "c"), [("x|y", "", "1"), ("", "", "2")]) == (
        "| a | c |\n| --- | --- |\n| x\\|y | 1 |\n|  | 2 |"
    )


def test_gpus_have_no_threads_and_changes_are_said():
    on_gpu = copy.deepcopy(RESULTS)
    on_gpu["machine_info"] |= {"kind": "cuda", "device": "A GPU"}
    on_gpu["commit_info"]["dirty"] = True
    [(name, text)] = report.documents({"gpu.json": on_gpu}).items()
    assert name == "A GPU"
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
    assert "# A Processor" in printed.out


def test_every_device_has_a_page(results, tmp_path, capsys):
    pages = tmp_path / "docs"
    assert report.main([str(results), "--pages", str(pages)]) == 0
    [page] = pages.iterdir()
    assert page.name == "a-processor-2-threads.md"
    assert page.read_text() == report.documents({results.as_posix(): RESULTS})["A Processor, 2 threads"]
    assert capsys.readouterr() == ("", "")


def test_pages_stay_as_they_are_if_a_file_is_bad(results, tmp_path):
    page = tmp_path / "a-processor-2-threads.md"
    page.write_text("old")
    assert report.main([str(results), str(tmp_path / "none.json"), "--pages", str(tmp_path)]) == 1
    assert page.read_text() == "old"


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
    assert "# A Processor" in printed.out


def test_pages_show_the_committed_results():
    if not (ROOT / "docs").is_dir():
        pytest.skip("tests beside no docs")
    files = {path.relative_to(ROOT).as_posix(): report.load(path) for path in COMMITTED}
    shown = {page.name: page.read_text("utf-8") for page in (ROOT / "docs" / "benchmarks").glob("*-*.md")}
    assert shown == {report.file_name(name): text for name, text in report.documents(files).items()}, (
        "run `python benchmarks/report.py benchmarks/results/*.json --pages docs/benchmarks`"
    )
