"""The registered op of sampling. It has no gradient."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from quietstar.ops._registration import register_op
from quietstar.ops.linear_sample import library
from quietstar.ops.linear_sample.chunks import sample_in_chunks
from quietstar.ops.linear_sample.inputs import Sampling


def _sample_in(module: str, *arguments: object) -> Tensor:
    """By a module that is imported when it is first used: what it needs may be missing, and triton takes its time."""
    return import_module(f"{__package__}.{module}").sample(*arguments)


# A backend takes hidden, weight and the Sampling.
_SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "torch": partial(sample_in_chunks, library.sample_rows),
    "triton": partial(_sample_in, "triton_matmul"),
    "cuda": partial(_sample_in, "native_cuda"),
    "cpu": partial(_sample_in, "native_cpu"),
}


def _linear_sample(hidden, weight, *arguments):
    *sampling, backend = arguments
    return _SAMPLERS[backend](hidden, weight, Sampling(*sampling))


linear_sample_op = register_op(
    "linear_sample(Tensor hidden, Tensor weight, Tensor seed, float temperature, float? softcap, Tensor? suppress,"
    " int? top_k, float? top_p, str backend) -> Tensor",
    _linear_sample,
    lambda hidden, *_: hidden.new_empty(hidden.shape[0], dtype=torch.int64),
)
