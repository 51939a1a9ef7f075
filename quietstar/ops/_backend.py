"""The choice of the backend that runs an op, the same for all ops. The backends of an op are in its ``backends.py``."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from quietstar.ops._availability import interpreted, triton_unavailable
from quietstar.ops._log import log_call
from quietstar.ops._native import cpu_unavailable, cuda_unavailable

BACKENDS = ("reference", "torch", "triton", "cuda", "cpu")
ENVIRONMENT_VARIABLE = "QUIETSTAR_BACKEND"
AUTO = "auto"

# Returns why a backend cannot run the given inputs, in one clause; None if it can.
Availability = Callable[..., str | None]


class Backend(NamedTuple):
    """One way to run an op."""

    unavailable: Availability
    load: Callable[[], Any]
    """Imports and returns the backend's code, on first use: triton may be missing and takes long to import."""


def always_available(*_: object) -> None:
    """The availability check of a backend that runs wherever torch does."""
    return None


def usual_backends(**load: Callable[[], Any]) -> dict[str, Backend]:
    """Create backends, in order of preference, that can run if their kernels can run on the op's first tensor."""
    unavailable = {"triton": triton_unavailable, "cuda": cuda_unavailable, "cpu": cpu_unavailable}
    return {name: Backend(unavailable.get(name, always_available), load[name]) for name in load}


def select_backend(
    op: str, requested: str | None, candidates: Mapping[str, Backend], *inputs: object, **tensors: Tensor | None
) -> str:
    """Return the name of the backend that runs ``op`` on ``inputs``.

    Args:
        op: name of the op, for messages.
        requested: the caller's ``backend`` argument: a name, or several separated by commas, of which the first that
            can run is used; the last may be ``"auto"`` for any. ``None`` defers to the environment variable
            ``QUIETSTAR_BACKEND`` (of the same form) and, if that is unset or empty, to ``"auto"``.
        candidates: the op's backends in order of preference. ``"auto"`` takes the first that can run, but
            never Triton's interpreter.
        inputs: passed to the availability checks.
        tensors: the tensors that the log of calls shows, by the names of the op's arguments.

    Raises:
        TypeError: ``requested`` is neither None nor a string.
        ValueError: a name is not a backend or occurs twice, or none of the named backends can run these inputs.
    """
    requested, source = _with_default(requested)
    names = _parse(requested, source)
    reasons = []
    for name in names:
        for backend in candidates if name == AUTO else (name,):
            if backend in candidates:
                reason = candidates[backend].unavailable(*inputs)
            else:
                reason = f"the op has {', '.join(candidates)}"
            if name == AUTO and backend == "triton" and interpreted():
                reason = f"Triton's interpreter, which is slow, is not for {AUTO!r}"
            if reason is None:
                log_call(op, backend, reasons, tensors)
                return backend
            reasons.append((backend, reason))
    usable = [name for name, candidate in candidates.items() if candidate.unavailable(*inputs) is None]
    advice = f" ('{requested.strip()},{usable[0]}' takes the first that can run)" if usable and names != [AUTO] else ""
    problems = "; ".join(f"{name!r} cannot run {op} here: {reason}" for name, reason in reasons)
    raise ValueError(f"{source}: {problems}; usable here: {', '.join(usable) or 'none'}{advice}")


def request_behind(requested: str | None, name: str) -> str:
    """Return the request for a pass that the backend ``name``, chosen from ``requested``, does not implement.

    Returns:
        The rest of the list after ``name``, followed by "auto".
    """
    names = _parse(*_with_default(requested))
    rest = names[names.index(name) + 1 :] if name in names else []
    return ",".join([*(other for other in rest if other != AUTO), AUTO])


def _with_default(requested: str | None) -> tuple[str, str]:
    """Return the request with the default filled in, and the name of its source."""
    if requested is not None:
        return requested, "backend"
    requested = os.environ.get(ENVIRONMENT_VARIABLE)
    if requested is None or not requested.strip():
        requested = AUTO
    return requested, f"{ENVIRONMENT_VARIABLE} (the default of backend)"


def _parse(requested: str, source: str) -> list[str]:
    """Return the names in ``requested``, in order."""
    if not isinstance(requested, str):
        raise TypeError(f"{source} must be None or a string, got {type(requested).__name__}")
    names = [name.strip() for name in requested.split(",")]
    if any(name != AUTO and name not in BACKENDS for name in names):
        raise ValueError(
            f"{source} must be None, {AUTO!r} or one of {', '.join(BACKENDS)}, or a list such as 'cuda,triton,torch', "
            f"got {requested!r}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{source} must name each backend once, got {requested!r}")
    if AUTO in names[:-1]:
        raise ValueError(f"{source} must have {AUTO!r} last, which takes whatever can run, got {requested!r}")
    return names
