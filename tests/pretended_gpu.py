"""A GPU that is not there: all that comes before a kernel runs, as it would with one.

Tensors on it are PyTorch's fake tensors. They have a device, shapes, strides and addresses, but no values: whatever
needs one fails. Of the project's own ops the code runs, not only what is registered to stand for it in
``torch.compile``; the two are compared wherever an op is called.
"""

import contextlib
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch._dynamo  # before _make_subclass is replaced, of which it keeps a signature
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from waiting import without_waiting

from quietstar.ops import _native


class Gpu(NamedTuple):
    """What the ops ask a GPU for."""

    capability: tuple[int, int]
    processors: int
    shared_memory: int
    """The most bytes that a block may have."""


GPUS = {
    "T4": Gpu((7, 5), 40, 64 << 10),
    "A100": Gpu((8, 0), 108, 163 << 10),
    "L40S": Gpu((8, 9), 142, 99 << 10),
    "H100": Gpu((9, 0), 132, 227 << 10),
    "B200": Gpu((10, 0), 148, 227 << 10),
}
DEVICE = torch.device("cuda", 0)


class Memory:
    """Addresses of fake tensors, as allocators would hand them out: a storage after the other."""

    _FIRST = {"cuda": 1 << 40, "cpu": 1 << 46}
    _ALIGNMENT = 512

    def __init__(self) -> None:
        self._next = dict(self._FIRST)
        self._blocks: dict[tuple[str, int], tuple[int, int]] = {}
        """First address and bytes, by device and by what tells storages apart. Kept when a storage is freed."""

    def address(self, tensor: torch.Tensor) -> int:
        """That of the first element; 0 of a tensor without any."""
        storage, device = tensor.untyped_storage(), tensor.device.type
        if storage.nbytes() == 0:
            return 0
        key = device, storage._cdata
        start, size = self._blocks.get(key, (0, 0))
        if size != storage.nbytes():
            start, size = self._next[device], storage.nbytes()
            self._blocks[key] = start, size
            self._next[device] += -(-size // self._ALIGNMENT) * self._ALIGNMENT
        return start + tensor.storage_offset() * tensor.element_size()

    def is_on_gpu(self, address: int) -> bool:
        """Whether a tensor is there, or was."""
        blocks = (block for (device, _), block in self._blocks.items() if device == "cuda")
        return any(start <= address < start + size for start, size in blocks)


@contextlib.contextmanager
def pretended(gpu: Gpu) -> Iterator[Memory]:
    """Tensors made inside, and on ``DEVICE``, are on this GPU."""
    memory = Memory()
    properties = SimpleNamespace(multi_processor_count=gpu.processors, L2_cache_size=32 << 20)
    replaced = {
        torch.cuda: {
            "get_device_capability": lambda device=None: gpu.capability,
            "get_device_properties": lambda device=None: properties,
            "current_device": lambda: DEVICE.index,
            "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0),
            "_exchange_device": lambda index: DEVICE.index,
            "_maybe_exchange_device": lambda index: DEVICE.index,
        },
        torch.backends.cuda: {"is_flash_attention_available": lambda: True},
        torch.Tensor: {"_make_subclass": staticmethod(_make_subclass)},
        FakeTensor: {
            "data_ptr": lambda self: memory.address(self),
            "is_cuda": property(lambda self: self.device.type == "cuda"),
            "get_device": lambda self: -1 if self.device.index is None else self.device.index,
        },
    }
    with contextlib.ExitStack() as stack:
        for owner, attributes in replaced.items():
            for name, value in attributes.items():
                stack.enter_context(patch.object(owner, name, value, create=True))
        for cached in _cached_properties():
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        stack.enter_context(_FakeTensors())
        stack.enter_context(_OwnOps())
        yield memory


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """A region of a pretended GPU in which nothing may wait for it: see ``waiting.without_waiting``."""
    with patch.object(_OwnOps, "nothing_waits", True):
        yield


def _cached_properties() -> list:
    found = [_native.processors]
    with contextlib.suppress(ImportError):
        launch = importlib.import_module("quietstar.ops.thought_attention.triton_launch")
        found += launch.processors, launch.cache_bytes
    return found


_tensors_make_subclass = torch.Tensor._make_subclass


def _make_subclass(cls, data, requires_grad=False, *, dispatch_device=False, **options):
    """Without ``dispatch_device`` autograd's engine takes fake tensors for what they wrap, tensors on "meta".

    Of those on a GPU it would ask CUDA's streams otherwise, which a PyTorch without CUDA does not have.
    """
    if options.get("device_for_backend_keys") == DEVICE:
        dispatch_device = False
    return _tensors_make_subclass(cls, data, requires_grad, dispatch_device=dispatch_device, **options)


class _FakeTensors(FakeTensorMode):
    """Puts on the GPU what C++ code makes like a fake tensor, which it takes for a tensor on "meta"."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == torch.device("meta"):
            kwargs["device"] = DEVICE
        if function is torch.ops.aten.addmm.dtype_out:  # torch 2.11 decomposes it wrongly: the dtype comes to be beta
            return kwargs["out"]
        return super().__torch_dispatch__(function, types, args, kwargs)


class _OwnOps(TorchDispatchMode):
    """Runs the code of the project's ops, and compares its results with what stands for it in ``torch.compile``."""

    nothing_waits = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace != "quietstar":
            return without_waiting(function, args, kwargs) if self.nothing_waits else function(*args, **kwargs)
        expected = function(*args, **kwargs)
        with self:
            result = function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        assert [*map(_layout, tree_leaves(result))] == [*map(_layout, tree_leaves(expected))], function
        return result


def _layout(tensor: torch.Tensor) -> tuple:
    """All but the values; strides of dimensions of size 1 say nothing."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    return tensor.dtype, tensor.device, tensor.shape, strides if tensor.numel() else ()
