"""The content of a page, and its rendering as one HTML file that loads nothing and runs only its own script."""

import base64
import hashlib
import platform
import time
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import torch
import transformers
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import quietstar
from quietstar.report.plots import Figure
from quietstar.report.view import SHADES, TokenView


class Card(NamedTuple):
    """A headline number."""

    value: str
    label: str
    tone: str = ""  # "up", "down" or neither


class Row(NamedTuple):
    """A line of the table of results."""

    name: str
    cells: Sequence[str]
    share: float | None = None  # length of its bar, from 0 to 1
    main: bool = False  # the row to highlight


class Table(NamedTuple):
    """Results next to their controls."""

    head: Sequence[str]  # headings of the columns, that of the names first
    rows: Sequence[Row]
    note: str


class Question(NamedTuple):
    """A question, the model's thought and answer, and whether the answer is right."""

    prompt: str
    thought: str
    said: str
    right: bool


class Page(NamedTuple):
    """The content of a page."""

    title: str
    lead: Sequence[str]  # paragraphs: the result
    cards: Sequence[Card]
    table: Table
    text_notes: Sequence[str]  # notes on the text
    view: TokenView
    figures: Sequence[Figure]
    made: Sequence[tuple[str, str]]  # how it was made
    questions: Sequence[Question] = ()


def made(command: str, seed: int, seconds: float, device: torch.device) -> list[tuple[str, str]]:
    """Describe how a page was made, for its last section."""
    where = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    minutes, rest = divmod(round(seconds), 60)
    return [
        ("Command", command),
        ("Seed", str(seed)),
        ("Time", f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"),
        ("Machine", f"{where}; {platform.system()} {platform.machine()}"),
        ("Versions", f"quietstar {quietstar.__version__}, torch {torch.__version__}, transformers "
                     f"{transformers.__version__}, Python {platform.python_version()}"),
        ("Date", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())),
    ]  # fmt: skip


def render(page: Page) -> str:
    """Render a page as HTML. All text in it is shown as text: templates escape it, and the script only reads it."""
    style, script = _asset("style.css"), _asset("script.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    figures = [figure._replace(svg=Markup(figure.svg)) for figure in page.figures]  # already escaped by ElementTree
    return _environment().get_template("page.html").render(
        page=page._replace(figures=figures), shades=range(1, SHADES + 1), policy=policy, style=Markup(style),
        script=Markup(script),
    )  # fmt: skip


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("quietstar.report", "assets"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


@cache
def _asset(name: str) -> str:
    return files("quietstar.report").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the hash by which a content security policy allows exactly this text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
