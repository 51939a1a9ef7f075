"""Every shape that is measured has a name of its own."""

import pytest
from shapes import LINEAR_CROSS_ENTROPY, LINEAR_SAMPLE, MIXED_LINEAR_CROSS_ENTROPY, by_rows

HEADS = LINEAR_CROSS_ENTROPY, LINEAR_SAMPLE, MIXED_LINEAR_CROSS_ENTROPY


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("heads", HEADS, ids=["linear", "sample", "mixed"])
def test_no_head_hides_another(heads, device):
    named = by_rows(heads[device])
    assert list(named.values()) == heads[device]
    if device == "cuda":  # the names of promises
        assert all(named[name].vocab_size == 32000 for name in ("2048", "16384"))
        assert {shape.vocab_size for shape in named.values()} == {32000, 128256, 152064}
