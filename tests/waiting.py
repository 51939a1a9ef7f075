"""What makes a program wait for its GPU, or a GPU for the host."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls of Triton's kernels do nothing: what is looked at is how they are called."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    jit = pytest.importorskip("triton.runtime.jit")
    for function in (interpreter.InterpretedFunction, jit.JITFunction):
        monkeypatch.setattr(function, "run", lambda *args, **options: None)


class NothingFromTheHost(TorchDispatchMode):
    """Fails where a tensor is copied between devices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            devices = {x.device.type for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)}
            assert devices == {"meta"}, f"copied between {devices}"
        return result
