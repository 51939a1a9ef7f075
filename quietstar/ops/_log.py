"""The log of calls: with ``QUIETSTAR_LOG=1`` every op prints once, to stderr, its inputs and the backend that runs it.

    quietstar: linear_sample(hidden [8, 64] float32, weight [1000, 64]) on cpu runs 'cpu'; 'triton' cannot: ...

The lines go through Python's ``logging`` (logger ``quietstar.ops``, level INFO), so a program with handlers of its own
receives them there.
"""

import logging
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "QUIETSTAR_LOG"

_logger = logging.getLogger("quietstar.ops")
_said: set[str] = set()


def log_call(op: str, backend: str, reasons: Sequence[tuple[str, str]], tensors: Mapping[str, Tensor | None]) -> None:
    """Log which backend runs a call, once for each combination of shapes, dtype and device.

    Args:
        reasons: for each preferred backend that cannot run the call, its name and the reason, in one clause.
        tensors: the relevant inputs, by the names of the op's arguments.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE, "0").lower() in ("", "0", "false", "no", "off"):
        return
    if torch.compiler.is_compiling():  # sizes are symbolic, so only the choice of the backend can be logged
        _say(f"{op}(), compiled, runs {backend!r}{_because(reasons)}")
        return
    first = next(x for x in tensors.values() if x is not None)
    shapes = []
    for name, tensor in tensors.items():
        if tensor is not None:
            dtype = "" if shapes and tensor.dtype == first.dtype else f" {str(tensor.dtype).removeprefix('torch.')}"
            shapes.append(f"{name} {list(tensor.shape)}{dtype}")
    _say(f"{op}({', '.join(shapes)}) on {first.device} runs {backend!r}{_because(reasons)}")


def _because(reasons: Sequence[tuple[str, str]]) -> str:
    return "".join(f"; {name!r} cannot: {reason}" for name, reason in reasons)


def _say(line: str) -> None:
    if line in _said:
        return
    _said.add(line)
    if not _logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("quietstar: %(message)s"))
        _logger.addHandler(handler)
    if not _logger.isEnabledFor(logging.INFO):
        _logger.setLevel(logging.INFO)
    _logger.info(line)


# torch.compile calls it during tracing without tracing into it.
_say._dynamo_marked_constant = True
