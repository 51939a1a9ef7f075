"""The figures of a report: SVG drawn by matplotlib in the page's colours, each described in words."""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from quietstar.evaluation import Gain

# Colours given to matplotlib, and the page's variables that replace them in the SVG (others in dark mode).
INK, FAINT, UP, DOWN, THOUGHT = COLOURS = "#010101", "#020202", "#030303", "#040404", "#050505"
NAMES = dict(zip(COLOURS, ("ink", "faint", "up", "down", "thought"), strict=True))
SIZE = 4.6, 2.9  # inches of 72 units, which a phone shows without shrinking letters much
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quietstar",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
# Properties set by matplotlib that the page does not set for all text.
KEPT = {"fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "opacity", "font-size"}
KEPT |= {"text-anchor", "stroke-linecap", "stroke-linejoin"}


class Figure(NamedTuple):
    """A figure with its texts."""

    title: str
    svg: str
    note: str = ""


@rc_context(STYLE)
def deciles(gains: Sequence[Gain], note: str) -> Figure:
    """Plot the gain on tenths of the tokens, easiest first."""
    values = [gain.gain.value for gain in gains]
    canvas, axes = _canvas("tenths of the tokens, easiest to hardest", "gain (nats)")
    colours = [UP if value >= 0 else DOWN for value in values]
    axes.bar(range(1, len(values) + 1), values, color=colours, yerr=_errors([g.gain.error for g in gains]), **ERRORS)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(range(1, len(values) + 1))
    described = ", ".join(f"{value:+.3f}".replace("-", "−") for value in values)
    title = "Gain by difficulty"
    return Figure(title, _svg(canvas, title, f"Gain in nats from the easiest tenth to the hardest: {described}."), note)


@rc_context(STYLE)
def staircase(
    lengths: Sequence[int], values: Sequence[float], errors: Sequence[float], label: str, own: int, note: str
) -> Figure:  # fmt: skip
    """Plot a measure by thought length; ``own`` is the length that the model was trained with."""
    canvas, axes = _canvas("tokens in a thought", label)
    colours = [THOUGHT if length == own else FAINT for length in lengths]
    axes.bar(range(len(lengths)), values, color=colours, yerr=_errors(errors), width=0.6, **ERRORS)
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.margins(y=0.12)
    for place, (value, error) in enumerate(zip(values, _errors(errors), strict=True)):
        up = value >= 0
        axes.annotate(
            _three_digits(value), (place, value + error if up else value - error), (0, 3 if up else -3),
            textcoords="offset points", ha="center", va="bottom" if up else "top",
        )  # fmt: skip
    numbers = zip(lengths, values, strict=True)
    described = ", ".join(f"{length} tokens: {_three_digits(value)}" for length, value in numbers)
    title = "Thought length"
    return Figure(title, _svg(canvas, title, f"{label} after thoughts of {described}."), note)


@rc_context(STYLE)
def weights(values: np.ndarray, note: str) -> Figure:
    """Plot the distribution of the mixing weight."""
    values = values[np.isfinite(values)]
    canvas, axes = _canvas("weight of the thought's prediction", "share of the tokens (%)")
    low, high = min(0.0, float(values.min(initial=0))), max(1.0, float(values.max(initial=1)))
    shares, edges = np.histogram(values, bins=32, range=(low, high))
    axes.bar(
        edges[:-1], 100 * shares / max(1, len(values)), np.diff(edges) * 0.9, align="edge", color=THOUGHT
    )  # fmt: skip
    quantiles = np.quantile(values, [0.1, 0.5, 0.9]) if len(values) else [np.nan] * 3
    described = "a tenth of the tokens below {:.2f}, half below {:.2f}, nine tenths below {:.2f}".format(*quantiles)
    title = "Weight of the thoughts"
    return Figure(title, _svg(canvas, title, f"Histogram of the mixing weight: {described}."), note)


@rc_context(STYLE)
def curves(history: Sequence[Mapping[str, float]], note: str) -> Figure | None:
    """Plot nll without and after a thought in the course of training; None if nothing was logged.

    Args:
        history: the trainer's logs.
        note: the figure's caption.
    """
    logs = [log for log in history if {"step", "base_nll", "talk_nll_0"} <= log.keys()]
    if len(logs) < 2:
        return None
    steps = [log["step"] for log in logs]
    canvas, axes = _canvas("training step", "nll per token (nats)")
    axes.plot(steps, [log["base_nll"] for log in logs], color=INK, linestyle="--", label="without thoughts")
    axes.plot(steps, [log["talk_nll_0"] for log in logs], color=UP, linewidth=2, label="after a thought")
    axes.legend()
    first, last = logs[0], logs[-1]
    described = (
        f"Without thoughts {first['base_nll']:.3f} at step {first['step']} and {last['base_nll']:.3f} at step "
        f"{last['step']}; after a thought {first['talk_nll_0']:.3f} and {last['talk_nll_0']:.3f}."
    )
    title = "Training"
    return Figure(title, _svg(canvas, title, described), note)


ERRORS = {"error_kw": {"color": INK, "ecolor": INK, "elinewidth": 1, "capsize": 2}}


def _three_digits(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _errors(errors: Sequence[float]) -> list[float]:
    """Return the lengths of error bars, 0 if there is only one window."""
    return [0 if np.isnan(error) else error for error in errors]


def _canvas(x: str, y: str) -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=SIZE, layout="constrained")
    axes = canvas.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
    return canvas, axes


def _svg(canvas: Canvas, title: str, description: str) -> str:
    """Render the figure as an SVG element without inline styles (the page forbids them), described in words."""
    file = io.StringIO()
    canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        parent.tail = None
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):
                parent.remove(child)
    prefix = "-".join(title.lower().split())
    used = {value.partition("#")[2].rstrip(")") for element in root.iter() for value in element.attrib.values()}
    for element in root.iter():
        _adapt(element, prefix, used)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{prefix}-title {prefix}-description"}
    for place, (tag, text) in enumerate({"title": title, "desc": description}.items()):
        element = ElementTree.Element(tag, id=f"{prefix}-{'title' if tag == 'title' else 'description'}")
        element.text = text
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(element: ElementTree.Element, prefix: str, used: set[str]) -> None:
    """Turn styles into attributes and colours into those of the page, and make ids unique."""
    element.tag = element.tag.removeprefix(SVG)  # HTML needs no namespace
    attributes = element.attrib
    if (identifier := attributes.pop("id", None)) in used:
        attributes["id"] = f"{prefix}-{identifier}"
    if target := attributes.pop(f"{XLINK}href", None):
        attributes["href"] = f"#{prefix}-{target[1:]}"
    if "clip-path" in attributes:
        attributes["clip-path"] = attributes["clip-path"].replace("#", f"#{prefix}-")
    for declaration in attributes.pop("style", "").split(";"):
        key, _, value = declaration.partition(":")
        key, value = key.strip(), value.strip()
        if key == "font":  # 10px 'DejaVu Sans', ...
            key, value = "font-size", value.split()[0]
        if key in KEPT:
            attributes[key] = value
    for key in ("fill", "stroke"):
        if attributes.get(key) in NAMES:
            attributes[key] = f"var(--{NAMES[attributes[key]]})"
