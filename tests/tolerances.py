"""The one rule by which tests decide that a result is accurate enough."""

import torch
from torch import Tensor


def assert_as_accurate(
    actual: Tensor,
    eager: Tensor,
    oracle: Tensor,
    *,
    slack: float = 2.0,
    ulps: float = 8.0,
    unit: torch.dtype | None = None,
    name: str = "result",
) -> None:
    """Assert that ``actual`` is about as close to the truth as ordinary PyTorch gets in the same dtype.

    The largest error of ``actual`` may be ``slack`` times the largest error of ``eager``, plus ``ulps`` units in the
    last place of the largest element (eager may happen to be exact). Infinities must sit exactly where the oracle has
    them, and NaN is always a failure.

    Args:
        actual: what is tested.
        eager: the same quantity by the obvious PyTorch expression on the same inputs in the same dtype.
        oracle: the same quantity in float64 on the same (upcast) inputs.
        slack, ulps: see above.
        unit: dtype whose units in the last place count; by default that of ``actual``. Where few numbers are made in
            a wide dtype from inputs in a narrow one, eager may be right by luck: give the narrow one, and few ulps.
        name: for the message.
    """
    assert oracle.dtype == torch.float64, f"{name}: the oracle must be float64, got {oracle.dtype}"
    assert actual.shape == oracle.shape, f"{name}: shape {list(actual.shape)} instead of {list(oracle.shape)}"
    assert eager.shape == oracle.shape, f"{name}: eager has shape {list(eager.shape)}, not {list(oracle.shape)}"
    if oracle.numel() == 0:
        return
    infinite = oracle.isinf()
    actual, eager = actual.detach(), eager.detach()
    assert torch.equal(actual[infinite].double(), oracle[infinite]), f"{name}: infinities are not where they must be"
    expected = oracle.detach().masked_fill(infinite, 0)
    error = (actual.double().masked_fill(infinite, 0) - expected).abs().max().item()
    eager_error = (eager.double().masked_fill(infinite, 0) - expected).abs().max().item()
    allowed = slack * eager_error + ulps * torch.finfo(unit or actual.dtype).eps * expected.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e} (eager itself: {eager_error:.3e})"
