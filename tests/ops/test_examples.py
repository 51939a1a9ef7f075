"""The examples in the docstrings of the ops run, and give what stands there."""

import doctest
import importlib

import pytest
import torch

from quietstar import ops

APIS = sorted({getattr(ops, name).__module__ for name in ops.__all__})


@pytest.mark.parametrize("module", APIS)
def test_examples(module):
    found = importlib.import_module(module)
    names = vars(found) | {"torch": torch}
    examples = {test.name.rpartition(".")[2]: test for test in doctest.DocTestFinder().find(found, extraglobs=names)}
    public = [name for name in ops.__all__ if getattr(ops, name).__module__ == module]
    for name in public:
        assert examples[name].examples, f"{name} has no example"
        assert doctest.DocTestRunner().run(examples[name]).failed == 0
