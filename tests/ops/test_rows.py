"""Blocks of rows cover every row once and never exceed their size."""

import pytest
import torch

from quietstar.ops._rows import blocks, logits_buffer


@pytest.mark.parametrize("leading", [(), (0,), (1,), (7,), (2, 5), (3, 0), (4, 3, 2), (2, 1, 1, 6)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 100])
def test_blocks_cover_each_row_once(leading, rows):
    times_seen = torch.zeros(leading)
    for index in blocks(torch.Size(leading), rows):
        assert times_seen[index].numel() <= rows
        times_seen[index] += 1
    assert torch.equal(times_seen, torch.ones(leading))


def test_blocks_are_as_large_as_they_may_be():
    assert len(list(blocks(torch.Size([4, 3, 2]), 12))) == 2


def test_rows_of_a_logits_buffer_are_aligned():
    buffer = logits_buffer(3, 77, torch.float32, torch.device("cpu"))
    assert buffer.shape == (3, 77)
    assert buffer.stride(0) % 32 == 0
