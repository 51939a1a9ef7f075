"""The registered op of sampling. It has no gradient."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from quietstar.ops._registration import register_op
from quietstar.ops.linear_sample import library
from quietstar.ops.linear_sample.chunks import sample_in_chunks


def _sample_compiled(module: str, *arguments: object) -> Tensor:
    """Imported when it is first used: the compiled module may be missing."""
    return sample_in_chunks(import_module(f"{__package__}.{module}").sample_rows, *arguments)


def _sample_with_triton(*arguments: object) -> Tensor:
    """Imported when it is first used: triton may be missing, and takes its time."""
    return import_module(f"{__package__}.triton_matmul").sample(*arguments)


# A backend takes the arguments of the op but its own name.
_SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "torch": partial(sample_in_chunks, library.sample_rows),
    "triton": _sample_with_triton,
    "cuda": partial(_sample_compiled, "native_cuda"),
    "cpu": partial(_sample_compiled, "native_cpu"),
}


def _linear_sample(hidden, weight, seed, suppress, temperature, top_k, top_p, backend):
    return _SAMPLERS[backend](hidden, weight, seed, suppress, temperature, top_k, top_p)


linear_sample_op = register_op(
    "linear_sample(Tensor hidden, Tensor weight, Tensor seed, Tensor? suppress, float temperature, int? top_k,"
    " float? top_p, str backend) -> Tensor",
    _linear_sample,
    lambda hidden, *_: hidden.new_empty(hidden.shape[0], dtype=torch.int64),
)
