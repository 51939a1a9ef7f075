"""What the linear cross-entropies refuse, and with which words."""

import re

import pytest
import torch

from quietstar.ops import linear_cross_entropy, mixed_linear_cross_entropy


def valid():
    return {"hidden": torch.randn(3, 4), "weight": torch.randn(5, 4), "target": torch.tensor([0, 1, 2])}


def valid_mixed():
    return {
        "base_hidden": torch.randn(2, 4), "thought_hidden": torch.randn(3, 4), "mixing_weight": torch.randn(3),
        "weight": torch.randn(5, 4), "target": torch.tensor([0, 1, 2]), "base_index": torch.tensor([0, 1, 1]),
    }  # fmt: skip


BAD = [
    ({"hidden": [[1.0]]}, TypeError, "hidden must be a torch.Tensor, got list"),
    ({"hidden": torch.randn(4)}, ValueError, "hidden must have shape [rows, H], got 1 dimensions: [4]"),
    ({"hidden": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "hidden must be float16, bfloat16, float32"),
    ({"weight": torch.randn(5, 3)}, ValueError, "weight must have shape [V, H] with H = 4 as in hidden, got [5, 3]"),
    ({"weight": torch.randn(5, 4).double()}, TypeError, "weight must have the dtype of hidden, torch.float32"),
    ({"weight": torch.randn(0, 4)}, ValueError, "weight must have at least one row"),
    ({"weight": torch.randn(5, 4, device="meta")}, ValueError, "weight must be on the device of hidden, cpu, got meta"),
    ({"target": torch.tensor([0, 1])}, ValueError, "target must have shape [rows] with rows = 3 as in hidden, got [2]"),
    ({"target": torch.tensor([0.0, 1, 2])}, TypeError, "target must be int32 or int64, got torch.float32"),
    ({"target": torch.tensor([0, 5, 1])}, ValueError, "target must be in [0, 5) or ignore_index = -100, got 5"),
    ({"target": torch.tensor([0, -1, 1])}, ValueError, "target must be in [0, 5) or ignore_index = -100, got -1"),
    ({"suppress": [2]}, ValueError, "target must not be suppressed, got 2"),
    ({"suppress": [5]}, ValueError, "suppress must be token ids in [0, 5), got 5"),
    ({"suppress": torch.tensor([-1])}, ValueError, "suppress must be token ids in [0, 5), got -1"),
    ({"suppress": range(5)}, ValueError, "suppress must leave at least one token, got all 5"),
    ({"suppress": [0.5]}, TypeError, "suppress must be token ids (integers), got [0.5]"),
    ({"suppress": torch.tensor([[3]])}, ValueError, "suppress must be one-dimensional, got shape [1, 1]"),
    ({"suppress": torch.tensor([3.0])}, TypeError, "suppress must be int32 or int64, got torch.float32"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    ({"temperature": float("nan")}, ValueError, "temperature must be positive and finite, got nan"),
    ({"temperature": 1e-40}, ValueError, "temperature must be between 1e-30 and 1e+30, got 1e-40"),
    ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got float"),
    ({"hidden": torch.randn(3, 0), "weight": torch.randn(5, 0)}, ValueError, "hidden must have at least one column"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number, got str"),
    ({"reduction": "average"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'average'"),
    ({"row_weight": torch.ones(3)}, ValueError, "row_weight must come with reduction='sum', got reduction='mean'"),
    ({"row_weight": torch.ones(2), "reduction": "sum"}, ValueError, "row_weight must have the shape of target, [3]"),
    ({"row_weight": torch.ones(3).long(), "reduction": "sum"}, TypeError, "row_weight must be floating point"),
    ({"softcap": 0.0}, ValueError, "softcap must be None, or positive and finite, got 0.0"),
    ({"softcap": -1}, ValueError, "softcap must be None, or positive and finite, got -1.0"),
    ({"softcap": float("inf")}, ValueError, "softcap must be None, or positive and finite, got inf"),
    ({"softcap": float("nan")}, ValueError, "softcap must be None, or positive and finite, got nan"),
    ({"softcap": 1e-40}, ValueError, "softcap must be between 1e-30 and 1e+30, got 1e-40"),
    ({"softcap": "soft"}, TypeError, "softcap must be None or a number, got str"),
    ({"softcap": True}, TypeError, "softcap must be None or a number, got bool"),
    ({"entropy_weight": 0.1}, ValueError, "entropy_weight must come with reduction='sum', got reduction='mean'"),
    ({"entropy_weight": "1", "reduction": "sum"}, TypeError, "entropy_weight must be None, a number or a torch.Tensor"),
    ({"entropy_weight": float("nan"), "reduction": "sum"}, ValueError, "entropy_weight must be finite, got nan"),
    (
        {"entropy_weight": torch.ones(2), "reduction": "sum"},
        ValueError,
        "entropy_weight must have the shape of target, [3], got [2]",
    ),
    (
        {"entropy_weight": torch.ones(3).long(), "reduction": "sum"},
        TypeError,
        "entropy_weight must be floating point, got torch.int64",
    ),
    (
        {"entropy_weight": torch.ones(3, device="meta"), "reduction": "sum"},
        ValueError,
        "entropy_weight must be on the device of target, cpu, got meta",
    ),
    ({"backend": "cuda"}, ValueError, "'cuda' cannot run linear_cross_entropy here: "),
]
BAD_MIXED = [
    ({"thought_hidden": torch.randn(3, 5)}, ValueError, "base_hidden must have shape [base_rows, H] with H = 5"),
    ({"base_index": None}, ValueError, "base_hidden must have shape [rows, H] with rows = 3 as in thought_hidden"),
    ({"base_index": torch.tensor([0, 1, 2])}, ValueError, "base_index must be in [0, 1], got values from 0 to 2"),
    ({"base_index": torch.tensor([0, -1, 1])}, ValueError, "base_index must be in [0, 1], got values from -1 to 1"),
    ({"base_index": torch.tensor([0.0, 1, 1])}, TypeError, "base_index must be int32 or int64, got torch.float32"),
    ({"base_index": torch.tensor([0, 1])}, ValueError, "base_index must have shape [rows] with rows = 3"),
    ({"mixing_weight": torch.randn(3, 1)}, ValueError, "mixing_weight must have shape [rows], got 2 dimensions"),
    ({"mixing_weight": torch.randn(3).half()}, TypeError, "mixing_weight must be float32 or have the dtype of base_"),
    ({"thought_hidden": torch.randn(3, 4).half()}, TypeError, "thought_hidden must have the dtype of base_hidden"),
    ({"softcap": 0.0}, ValueError, "softcap must be None, or positive and finite, got 0.0"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    ({"target": torch.tensor([0, 9, 1])}, ValueError, "target must be in [0, 5) or ignore_index = -100, got 9"),
    ({"base_index": torch.tensor([0, 1, 1], device="meta")}, ValueError, "base_index must be on the device of base_"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(change, error, message):
    linear_cross_entropy(**valid())
    with pytest.raises(error, match=re.escape(message)):
        linear_cross_entropy(**{**valid(), **change})


@pytest.mark.parametrize(("change", "error", "message"), BAD_MIXED, ids=[message for *_, message in BAD_MIXED])
def test_bad_input_mixed(change, error, message):
    mixed_linear_cross_entropy(**valid_mixed())
    with pytest.raises(error, match=re.escape(message)):
        mixed_linear_cross_entropy(**{**valid_mixed(), **change})
