"""How ops are registered with PyTorch, so that ``torch.compile`` and ``opcheck`` see each as one opaque call."""

from collections.abc import Callable

import torch
from torch import Tensor

from quietstar.ops._precision import autocast_off

_LIBRARY = torch.library.Library("quietstar", "FRAGMENT")


def register_op(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Register ``quietstar::<schema>`` and return the callable op.

    Autograd stays outside, in an ``autograd.Function`` that calls the op. The implementation runs with autocast off:
    an op chooses its dtypes itself, also when its backward happens to run inside an autocast region. It runs with the
    device of the first tensor current, which is where Triton launches kernels.

    Args:
        schema: name, arguments and results in the schema language of PyTorch; the first argument is a tensor.
        implementation: what runs on real tensors of any device.
        fake: allocates results of the same shapes, strides, dtypes and devices without computing anything.
    """
    name = schema.partition("(")[0]

    def run(first: Tensor, *others: object) -> object:
        with autocast_off(first.device), torch.cuda.device_of(first):
            return implementation(first, *others)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quietstar::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.quietstar, name).default
