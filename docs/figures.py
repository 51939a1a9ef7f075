"""The figures of README and docs, drawn from committed results, for light and for dark pages. Needs matplotlib.

python docs/figures.py                            from docs/results/
python docs/figures.py quickstart/results.json    after taking over what `quietstar quickstart --controls` found
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULTS, IMAGES = HERE / "results" / "quickstart.json", HERE / "images"
BENCHMARKS = HERE.parent / "benchmarks" / "results" / "cpu-2-threads.json"
THEMES = {
    "light": {"ink": "#1c2230", "soft": "#8d93a1", "line": "#d5d0c5", "up": "#0b8a78"},
    "dark": {"ink": "#e8e9ee", "soft": "#6c7487", "line": "#3a4152", "up": "#3ecbb2"},
}
OWN = "after a thought"
# Names in the results, and in the figure.
KINDS = {"without": "without thoughts", "with": OWN, "shuffled": "after another question's thought"}
CONTROLS = {
    "after random people": "after random people for thoughts",
    "trained with filler tokens for thoughts": "trained with filler tokens for thoughts",
    "trained with policy weight 0": "trained without the policy term",
    "ordinary training on the same text": "ordinary training on the same text",
}
# Benchmarks of the front figure.
SPEED = {
    "bench_training_step": "training step",
    "bench_thought_attention[cpu-forward+backward]": "attention, forward and backward",
    "bench_thought_attention[cpu-sampling step]": "attention, sampling step",
    "bench_cross_entropy[cpu-linear-4096]": "cross-entropy of 4096 rows",
}
# Not peers: our own other backend, and what does less.
NOT_PEERS = {"ours", "our torch backend", "base model, no thoughts"}
LENGTHS = {length: f"trained with thoughts of length {length}" for length in range(4)}


def main() -> None:
    """Draw every figure in every theme."""
    parser = argparse.ArgumentParser(description="Draw the figures of README and docs.")
    parser.add_argument("results", nargs="?", type=Path, help="results.json of a quickstart with --controls, to keep")
    if (path := parser.parse_args().results) is not None:
        taken = {name: value for name, value in json.loads(path.read_text()).items() if name != "questions"}
        RESULTS.write_text(json.dumps(taken, indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    for theme, colours in THEMES.items():
        style = {"font.size": 11, "svg.hashsalt": "quietstar", "text.color": colours["ink"]}
        style |= dict.fromkeys(("xtick.color", "ytick.color", "axes.labelcolor"), colours["ink"])
        with rc_context(style):
            figures = {
                "front": front(results, json.loads(BENCHMARKS.read_text()), colours),
                "quickstart": quickstart(results, colours),
            }
            for name, figure in figures.items():
                figure.savefig(IMAGES / f"{name}-{theme}.svg", transparent=True, metadata={"Date": None})


def front(results: dict[str, Any], benchmarks: dict[str, Any], colours: dict[str, str]) -> Figure:
    """Answers right without and after thoughts; and what the best peers take, over what we take."""
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    bars, speed = figure.subplots(1, 2)
    _answers(bars, results, colours)
    for place, name in enumerate(SPEED):
        found = next(each["extra_info"]["candidates"] for each in benchmarks["benchmarks"] if each["name"] == name)
        ours = found["ours"]
        peers = [peer for kind, peer in found.items() if kind not in NOT_PEERS]
        best = min(peers, key=lambda peer: peer["median_ms"])
        ratios = {"time": best["median_ms"] / ours["median_ms"]}
        if best["peak_mib"] and ours["peak_mib"]:
            ratios["memory"] = best["peak_mib"] / ours["peak_mib"]
        for row, (kind, ratio) in enumerate(ratios.items()):
            height = place + 0.36 * row
            speed.barh(height, ratio, color=colours["up" if kind == "time" else "soft"], height=0.3)
            speed.annotate(f"{ratio:.1f} × {kind}", (ratio, height), (5, 0), textcoords="offset points", va="center")
    speed.axvline(1, color=colours["ink"], linewidth=0.8)
    speed.set_yticks([place + 0.1 for place in range(len(SPEED))], SPEED.values())
    speed.set(xlim=(0, 8), xticks=[])
    speed.invert_yaxis()
    _finish(speed, "Best peer over ours (2 CPU cores)", colours)
    return figure


def quickstart(results: dict[str, Any], colours: dict[str, str]) -> Figure:
    """Answers right without and after thoughts, beside the controls; and by thought length."""
    controls = {control["name"]: control["accuracy"] for control in results["controls"]}
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    bars, stairs = figure.subplots(1, 2, width_ratios=[3, 2])
    _answers(bars, results, colours)

    own = results["thought_length"]
    lengths = {length: controls[name] for length, name in LENGTHS.items() if length != own}
    lengths = dict(sorted((lengths | {own: results["accuracy_with"]}).items()))
    stairs.bar(range(len(lengths)), lengths.values(), color=_shades(lengths, own, colours), width=0.62)
    stairs.set_xticks(range(len(lengths)), map(str, lengths))
    stairs.set(ylim=(0, 1.14), yticks=[], xlabel="tokens in a thought")
    for place, (length, share) in enumerate(lengths.items()):
        weight = "bold" if length == own else "normal"
        stairs.annotate(_percent(share), (place, share), (0, 4), textcoords="offset points", ha="center", weight=weight)
    _finish(stairs, "By thought length", colours)
    return figure


def _answers(bars: Axes, results: dict[str, Any], colours: dict[str, str]) -> None:
    controls = {control["name"]: control["accuracy"] for control in results["controls"]}
    shares = {label: results[f"accuracy_{kind}"] for kind, label in KINDS.items()}
    shares |= {label: controls[name] for name, label in CONTROLS.items()}
    bars.barh(range(len(shares)), shares.values(), color=_shades(shares, OWN, colours), height=0.62)
    bars.set_yticks(range(len(shares)), shares)
    bars.set(xlim=(0, 1.14), xticks=[])
    bars.invert_yaxis()
    for place, (label, share) in enumerate(shares.items()):
        weight = "bold" if label == OWN else "normal"
        bars.get_yticklabels()[place].set_weight(weight)
        bars.annotate(_percent(share), (share, place), (5, 0), textcoords="offset points", va="center", weight=weight)
    _finish(bars, "Questions that no text answered, right", colours)


def _shades(labels: dict, own: object, colours: dict[str, str]) -> list[str]:
    return [colours["up" if label == own else "soft"] for label in labels]


def _percent(share: float) -> str:
    return "100 %" if share == 1 else f"{share:.1%}".replace("%", " %")


def _finish(axes: Axes, title: str, colours: dict[str, str]) -> None:
    axes.set_title(title, loc="left", fontsize=12, pad=10)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom" if axes.get_xticks().size == 0 else "left"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(colours["line"])


if __name__ == "__main__":
    main()
