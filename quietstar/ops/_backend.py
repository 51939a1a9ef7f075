"""Which backend runs an op: one resolver for all of them."""

import os
from collections.abc import Callable, Mapping

from quietstar.ops._triton import interpreted

BACKENDS = ("reference", "torch", "triton", "cuda", "cpu")
ENVIRONMENT_VARIABLE = "QUIETSTAR_BACKEND"

# Why a backend cannot run the given inputs, in one clause; None if it can.
Availability = Callable[..., str | None]


def always_available(*_: object) -> None:
    """The availability of a backend that runs anywhere torch does."""
    return None


def select_backend(op: str, requested: str | None, candidates: Mapping[str, Availability], *inputs: object) -> str:
    """Return the name of the backend that runs ``op`` on ``inputs``.

    Args:
        op: name of the op, for messages.
        requested: the caller's ``backend`` argument. ``None`` defers to the environment variable
            ``QUIETSTAR_BACKEND`` and, when that is unset too, to ``"auto"``.
        candidates: the op's backends in order of preference, each with its availability check.
            ``"auto"`` takes the first that can run, but never Triton's interpreter.
        inputs: handed to the availability checks.

    Raises:
        ValueError: the name is not a backend, or the named backend cannot run these inputs.
            Only ``"auto"`` falls back.
    """
    source = "backend"
    if requested is None and ENVIRONMENT_VARIABLE in os.environ:
        requested, source = os.environ[ENVIRONMENT_VARIABLE], f"{ENVIRONMENT_VARIABLE} (the default of backend)"
    if requested is None or requested == "auto":
        for name, unavailable in candidates.items():
            if unavailable(*inputs) is None and not (name == "triton" and interpreted()):
                return name
        raise ValueError(f"backend: none of {', '.join(candidates)} can run {op} on these inputs")
    if requested not in BACKENDS:
        raise ValueError(f"{source} must be None, 'auto' or one of {', '.join(BACKENDS)}, got {requested!r}")
    if requested not in candidates:
        raise ValueError(f"{source}: {op} has no {requested!r} backend; it has {', '.join(candidates)}")
    reason = candidates[requested](*inputs)
    if reason is not None:
        usable = [name for name, unavailable in candidates.items() if unavailable(*inputs) is None]
        raise ValueError(
            f"{source}: {requested!r} cannot run {op} here: {reason}; usable here: {', '.join(usable) or 'none'}"
        )
    return requested
