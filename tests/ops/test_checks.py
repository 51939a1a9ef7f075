"""When checks read values."""

import pytest
import torch

from quietstar.ops._checks import CHECK_VALUES_VARIABLE, can_read_values


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (None, False), ("", False), (" ", False), ("0", False), ("false", False), ("False", False), ("no", False),
        ("OFF", False), ("1", True), ("true", True), ("yes", True), ("2", True),
    ],
)  # fmt: skip
def test_the_variable_turns_checks_on_where_they_wait(value, read, monkeypatch):
    monkeypatch.delenv(CHECK_VALUES_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(CHECK_VALUES_VARIABLE, value)
    assert can_read_values(torch.zeros(1, device="meta")) == read  # stands in for a GPU
    assert can_read_values(torch.zeros(1))
