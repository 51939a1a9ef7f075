"""The examples in the pages under docs/ run, and give what stands there."""

import doctest
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples(page):
    failed, _ = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert failed == 0


def test_there_are_examples():
    with_examples = [page.stem for page in PAGES if doctest.DocTestParser().get_examples(page.read_text("utf-8"))]
    assert {"adapters", "thought_attention"} <= set(with_examples)
