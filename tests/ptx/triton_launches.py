"""Triton kernels on CPU tensors, compiled for a GPU that is not there: each launch compiles to PTX and emulates that.

``emulate(architecture)`` changes Triton in this process, for good; it must not be one of Triton's interpreter.
"""

import functools
import os
import struct
from collections.abc import Callable
from types import SimpleNamespace

import triton
from compile_kernels import pretend_gpu
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from .kernel import Buffer, Kernel, Module
from .launches import launch, reached
from .library import kept
from .tensor_map import tensor_map

_FORMATS = {
    "i1": "<B", "u1": "<B", "i8": "<b", "u8": "<B", "i16": "<h", "u16": "<H", "i32": "<i", "u32": "<I", "i64": "<q",
    "u64": "<Q", "fp32": "<f", "fp64": "<d",
}  # fmt: skip

# Changes a kernel's PTX before it is run: (name of the kernel, text) -> text. For tests of the emulator itself.
state = SimpleNamespace(edit=None)


def emulate(architecture: int) -> None:
    """Let launches of Triton kernels run emulated on ``architecture`` (80, 90), on tensors of the CPU."""
    # A cache of its own: what is compiled here must never be launched on a GPU.
    os.environ["TRITON_CACHE_DIR"] = str(kept("emulated-triton", triton.__version__))
    CUDABackend.make_cubin = lambda self, *arguments: b""  # ptxas is not needed: it is the PTX that runs
    pretend_gpu(architecture)
    if not hasattr(JITFunction.run, "compile"):
        JITFunction.run = _emulated_run(JITFunction.run)


def _emulated_run(compile_launch: Callable) -> Callable:
    def run(self, *args, grid, warmup, **options):
        compiled = compile_launch(self, *args, grid=grid, warmup=True, **options)
        if warmup:
            return compiled
        names = [parameter.name for parameter in self.params]
        bound = self.signature.bind(*args, **{name: value for name, value in options.items() if name in names})
        bound.apply_defaults()
        signature = compiled.src.signature
        arguments = [leaf for name in names for leaf in _leaves(bound.arguments[name], signature[name])]
        grid = tuple(int(n) for n in (grid(bound.arguments) if callable(grid) else grid))
        _launch(compiled, arguments, grid + (1,) * (3 - len(grid)))
        return compiled

    run.compile = compile_launch
    return run


def _leaves(value, type_name) -> list[tuple]:
    """(value, type) of what an argument hands to the kernel; tuples by their elements, constants not at all."""
    if isinstance(type_name, tuple):
        pairs = zip(value, type_name, strict=True) if value is not None else ()
        return [leaf for each, each_type in pairs for leaf in _leaves(each, each_type)]
    return [] if type_name == "constexpr" else [(value, type_name)]


@functools.lru_cache(64)  # megabytes each
def _decoded(ptx: str) -> Kernel:
    module = Module(ptx)
    (name,) = module.entries
    return Kernel(module, name)


def _launch(compiled, arguments: list[tuple], grid: tuple[int, int, int]) -> None:
    metadata = compiled.metadata
    ptx = compiled.asm["ptx"]
    kernel = _decoded(state.edit(metadata.name, ptx) if state.edit else ptx)
    parameters, buffers = _packed(kernel, arguments, metadata)
    launch(metadata.name, kernel, grid, 32 * metadata.num_warps, metadata.shared, parameters, buffers)


def _packed(kernel: Kernel, arguments: list[tuple], metadata) -> tuple[bytes, list[Buffer]]:
    """Bytes of the parameters, and the memory they point to."""
    tensors = [value for value, type_name in arguments if type_name.startswith("*") and value is not None]
    descriptors = iter(metadata.tensordesc_meta or [])
    flat = []
    for value, type_name in arguments:
        if not type_name.startswith("tensordesc"):
            flat.append((value, type_name))
            continue
        tensors.append(value.base)
        flat.append((_tensor_map(value, next(descriptors)), "tensor map"))
        flat += [(int(n), "i32") for n in value.shape] + [(int(n), "i64") for n in value.strides]
    data = bytearray(kernel.parameter_bytes)
    # Two pointers of Triton's own follow: scratch memory, which our kernels do not use.
    for parameter, (value, type_name) in zip(kernel.parameters[:-2], flat, strict=True):
        if type_name.startswith("*"):
            value, layout = 0 if value is None else value.data_ptr(), "<Q"
        elif type_name == "tensor map":
            layout = "<128s"
        else:
            layout = _FORMATS[type_name]
        if struct.calcsize(layout) != parameter.size:
            raise TypeError(f"{kernel.name}: parameter {parameter.name} has {parameter.size} bytes, not {type_name}")
        struct.pack_into(layout, data, parameter.offset, value)
    return bytes(data), reached(tensors)


def _tensor_map(descriptor, metadata: dict) -> bytes:
    size = descriptor.base.element_size()
    if metadata["fp4_padded"] or metadata["is_im2col"] or metadata["elem_size"] != size or descriptor.strides[-1] != 1:
        raise NotImplementedError(f"a descriptor that is not emulated: {metadata}")
    return tensor_map(
        descriptor.base, descriptor.shape, descriptor.strides, metadata["block_size"], metadata["swizzle"]
    )  # fmt: skip
