"""The page is safe whatever it holds."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from hostile_text import HOSTILE

from quietstar.report.page import Card, Page, Question, Row, Table, made, render
from quietstar.report.reading import cut, read
from quietstar.report.view import token_view


class Elements(HTMLParser):
    """Names of a page's elements, their attributes, and the text within scripts, styles and bold tokens."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self.inside = [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "input", "img", "br"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if self.inside:
            self.text.setdefault(self.inside[-1], []).append(data)


def page_of(view, text="harmless"):
    return Page(
        title=text, lead=[text], cards=[Card(text, text)], table=Table([text, text], [Row(text, [text], 0.5)], text),
        text_notes=[text], view=view, figures=[], made=[(text, text)], questions=[Question(text, text, text, False)],
    )  # fmt: skip


@pytest.fixture
def view(model, tokenizer):
    windows, counted = cut(tokenizer(HOSTILE * 3)["input_ids"], 128)
    view = token_view(tokenizer, read(model, windows, counted, seed=0), joined=True)
    view.data["strings"][view.data["rows"][1][1]] = HOSTILE  # what was thought
    return view


def test_markup_shows_as_text(view):
    harmless, hostile = (Elements(render(page_of(view, text))) for text in ("harmless", HOSTILE))
    assert hostile.elements == harmless.elements
    assert not [tag for tag, _ in hostile.elements if tag in ("img", "iframe", "object", "form")]
    assert [attributes for tag, attributes in hostile.elements if tag == "script"] == [
        {"type": "application/json", "id": "data"}, {}
    ]  # fmt: skip
    assert not [key for _, attributes in hostile.elements for key in attributes if key.startswith("on")]
    data = json.loads(hostile.text["script"][0])
    assert data == view.data
    assert HOSTILE in data["strings"]
    assert {c for c in hostile.text["script"][0] if c in "<>&\u2028"} == set()
    assert "".join(hostile.text["b"]) == "".join(token.text for block in view.blocks for token in block)


def test_nothing_is_loaded_and_only_the_page_s_own_script_runs(view):
    html = render(page_of(view))
    (policy,) = (a["content"] for tag, a in Elements(html).elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r'(?:src|href)="(?!data:,|#)', html)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|@import", html)
    assert "url(" not in html.replace("url(#", "")


def test_five_thousand_tokens_are_small_enough(model, tokenizer):
    tokens = torch.randint(1, len(tokenizer), (5000,)).tolist()
    windows, counted = cut(tokens, 256)
    view = token_view(tokenizer, read(model, windows, counted, seed=0), joined=True)
    assert len(view.data["rows"]) == 5000
    assert len(render(page_of(view)).encode()) < 2e6


def test_how_it_was_made():
    facts = dict(made("quietstar report", 7, 125.0, torch.device("cpu")))
    assert facts["Command"] == "quietstar report"
    assert facts["Seed"] == "7"
    assert facts["Time"] == "2 min 5 s"
    assert f"torch {torch.__version__}" in facts["Versions"]
