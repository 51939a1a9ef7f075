"""The figures of README and docs can be drawn, and show the committed results."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "docs").is_dir():
    pytest.skip("tests beside no docs", allow_module_level=True)


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(figures, monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    monkeypatch.setattr("sys.argv", ["figures.py", *map(str, arguments)])
    figures.main()
    return {file.name for file in tmp_path.glob("*.svg")}


def test_every_picture_is_drawn_and_used(figures, monkeypatch, tmp_path):
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    used = {name for page in pages for name in re.findall(r"images/([\w-]+\.svg)", page.read_text("utf-8"))}
    assert used == drawn(figures, monkeypatch, tmp_path)
    assert used <= {file.name for file in (ROOT / "docs" / "images").iterdir()}


def test_the_figure_shows_the_results(figures):
    results = json.loads(figures.RESULTS.read_text())
    figure = figures.quickstart(results, figures.THEMES["light"])
    bars, stairs = ([text.get_text() for text in axes.texts] for axes in figure.axes)
    assert bars[:3] == ["4.8 %", "100 %", "6.1 %"]
    assert stairs == ["5.0 %", "9.6 %", "100 %", "100 %"]
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    assert widths[:3] == [results[f"accuracy_{kind}"] for kind in ("without", "with", "shuffled")]


def test_the_front_figure_compares_with_the_best_peer(figures):
    benchmarks = json.loads(figures.BENCHMARKS.read_text())
    figure = figures.front(json.loads(figures.RESULTS.read_text()), benchmarks, figures.THEMES["dark"])
    found = {each["name"]: each["extra_info"] for each in benchmarks["benchmarks"]}
    step = found["bench_training_step"]["candidates"]
    memory = step["sequential baseline"]["peak_mib"] / step["ours"]["peak_mib"]
    texts = [text.get_text() for text in figure.axes[1].texts]
    time = found["bench_training_step"]["best_peer_ratio"]
    assert texts[:2] == [f"{time:.1f} × time", f"{memory:.1f} × memory"]


def test_results_are_taken_over_without_the_questions(figures, monkeypatch, tmp_path):
    results = json.loads(figures.RESULTS.read_text())
    (tmp_path / "results.json").write_text(json.dumps(results | {"accuracy_without": 0.5, "questions": [1, 2]}))
    monkeypatch.setattr(figures, "RESULTS", tmp_path / "kept.json")
    drawn(figures, monkeypatch, tmp_path, tmp_path / "results.json")
    assert json.loads((tmp_path / "kept.json").read_text()) == results | {"accuracy_without": 0.5}
