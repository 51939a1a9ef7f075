"""What makes a program wait for its GPU, or a GPU for the host."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

_WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_COPIES = ("aten::_to_copy", "aten::copy_", "aten::copy")


def launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls of Triton's kernels do nothing: what is looked at is how they are called."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    jit = pytest.importorskip("triton.runtime.jit")
    for function in (interpreter.InterpretedFunction, jit.JITFunction):
        monkeypatch.setattr(function, "run", lambda *args, **options: None)


def without_waiting(function: torch._ops.OpOverload, args: tuple, kwargs: dict) -> object:
    """Call an op of PyTorch; fails where the host would wait for the GPU, or read memory of the host that is to change.

    A CUDA graph would read that again whenever it is replayed.
    """
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    name = function.name().partition(".")[0]
    if any(x.is_cuda for x in given):
        if name in _INDEXING:
            masks = [x for x in tree_leaves(args[1]) if x is not None and x.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{function} counts what a mask has"
        else:
            assert not _WAITING.intersection(function.tags), f"{function} waits for the GPU"
    result = function(*args, **kwargs)
    if name in _COPIES:
        devices = {str(x.device) for x in tree_leaves((given, result)) if isinstance(x, torch.Tensor)}
        assert len(devices) == 1, f"{function} copies between {' and '.join(sorted(devices))}"
    return result
