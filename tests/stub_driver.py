"""CUDA's driver without a GPU: refuses what the real one would, and keeps what it is asked to launch.

``csrc/cuda_driver.c`` is built as ``libcuda.so.1`` and loaded in front of any other, so it is for processes of their
own (``triton_launches``). A kernel's image is its PTX, which the real driver takes too: parameters are read from there.
Limits are those of the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and of
``cuLaunchKernelEx`` and ``cuTensorMapEncodeTiled`` in the CUDA Driver API reference.
"""

import contextlib
import ctypes
import os
import re
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pretended_gpu import Gpu

COMPILER = os.environ.get("CC", "gcc")
SOURCE = Path(__file__).parent / "csrc/cuda_driver.c"

_SUCCESS, _INVALID_VALUE = 0, 1  # CUresult
_WITHOUT_ASKING = 48 << 10  # bytes of shared memory that any function may have
_MOST_THREADS = 1024
_LARGEST_GRID = 2**31 - 1, 65535, 65535

# CUdevice_attribute
_MOST_SHARED_MEMORY = 97  # MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_CAPABILITY = 75, 76
_OTHER_DEVICE_ATTRIBUTES = {10: 32, 12: 65536, 13: 1_500_000, 36: 2_000_000, 37: 5120}  # warp, registers, clocks, bus
_MULTIPROCESSORS, _SHARED_MEMORY_OF_A_MULTIPROCESSOR = 16, 81
# CUfunction_attribute
_THREADS, _STATIC_SHARED, _LOCAL, _REGISTERS, _DYNAMIC_SHARED = 0, 1, 3, 4, 8

_FORMATS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "s32": "i", "s64": "q", "f32": "f", "f64": "d"}


class Function:
    """A kernel that was loaded."""

    def __init__(self, ptx: str):
        entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", ptx, re.DOTALL)
        self.name, parameters, directives = entry.groups()
        self.parameters = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,\[]*(?:\[(\d+)\])?", parameters)
        """Type of each parameter, and the number of bytes of an array."""
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", directives)
        self.threads = min(int(threads[1]), _MOST_THREADS) if threads else _MOST_THREADS
        self.dynamic_shared = _WITHOUT_ASKING

    def read(self, addresses: ctypes.Array) -> list[tuple[str, float | int]]:
        """Type and value of every parameter but arrays, of which there are the bytes as one number."""
        found = []
        for i, (kind, size) in enumerate(self.parameters):
            code = _FORMATS.get(kind, "B")
            data = ctypes.string_at(addresses[i], int(size) if size else struct.calcsize(code))
            value = int.from_bytes(data, "little") if size else struct.unpack(f"<{code}", data)[0]
            found.append((f"{kind}[{size}]" if size else kind, value))
        return found


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    """Bytes of dynamic shared memory of a block."""
    arguments: list[tuple[str, float | int]]
    """Type in PTX and value of each, in order; the last two are scratch memory of Triton's."""


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


class StubDriver:
    """The driver library, loaded into this process.

    Args:
        gpu: what it says there is.
        is_on_gpu: whether an address is in the memory of the GPU.
        folder: where the library is built.
    """

    def __init__(self, gpu: Gpu, is_on_gpu: Callable[[int], bool], folder: Path, include: Path):
        self._gpu, self._is_on_gpu = gpu, is_on_gpu
        self._functions: dict[int, Function] = {}
        self.launches: list[Launch] = []
        library = ctypes.CDLL(str(_built(folder, include)), ctypes.RTLD_GLOBAL)
        self._hooks = [
            kind(_answering(function))
            for kind, function in (
                (ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int), self._device_attribute),
                (ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64), self._is_on_gpu),
                (ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_char_p), self._load),
                (ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_int), self._function_attribute),
                (ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int), self._set_attribute),
                (
                    ctypes.CFUNCTYPE(
                        ctypes.c_int, ctypes.POINTER(_Config), ctypes.c_uint64, ctypes.POINTER(ctypes.c_void_p)
                    ),
                    self._launch,
                ),
                (
                    ctypes.CFUNCTYPE(
                        ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64),
                        ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint32), ctypes.c_int, ctypes.c_int,
                    ),
                    self._encode_tiled,
                ),
            )
        ]  # fmt: skip
        table = (ctypes.c_void_p * len(self._hooks)).in_dll(library, "hooks")
        for i, hook in enumerate(self._hooks):
            table[i] = ctypes.cast(hook, ctypes.c_void_p).value

    def _device_attribute(self, attribute: int) -> int:
        gpu = self._gpu
        return (
            dict(zip(_CAPABILITY, gpu.capability, strict=True))
            | {_MULTIPROCESSORS: gpu.processors, _MOST_SHARED_MEMORY: gpu.shared_memory}
            | {_SHARED_MEMORY_OF_A_MULTIPROCESSOR: gpu.shared_memory + 1024}
            | _OTHER_DEVICE_ATTRIBUTES
        ).get(attribute, -1)

    def _load(self, image: bytes) -> int:
        number = len(self._functions) + 1
        self._functions[number] = Function(image.decode())
        return number

    def _function_attribute(self, number: int, attribute: int) -> int:
        threads = self._functions[number].threads
        return {_THREADS: threads, _STATIC_SHARED: 0, _LOCAL: 0, _REGISTERS: 32}.get(attribute, -1)

    def _set_attribute(self, number: int, attribute: int, value: int) -> int:
        if attribute != _DYNAMIC_SHARED or not 0 <= value <= self._gpu.shared_memory:
            return _INVALID_VALUE
        self._functions[number].dynamic_shared = value
        return _SUCCESS

    def _launch(self, config, number: int, addresses) -> int:
        config, function = config.contents, self._functions[number]
        if config.attribute_count:
            raise NotImplementedError("clusters and other attributes of a launch")
        if not all(1 <= size <= most for size, most in zip(config.grid, _LARGEST_GRID, strict=True)):
            return _INVALID_VALUE
        if not 1 <= config.block[0] <= function.threads or list(config.block[1:]) != [1, 1]:
            return _INVALID_VALUE
        if config.shared > function.dynamic_shared:
            return _INVALID_VALUE
        launch = Launch(function.name, tuple(config.grid), config.block[0], config.shared, function.read(addresses))
        self.launches.append(launch)
        return _SUCCESS

    def _encode_tiled(self, rank: int, address: int, sizes, strides, box, element_type: int, swizzle: int) -> int:
        element = (1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4)[element_type]
        width = box[0] * element
        wrong = (
            not 1 <= rank <= 5
            or address % 16
            or not self._is_on_gpu(address)
            or not all(1 <= sizes[i] <= 2**32 and 1 <= box[i] <= 256 for i in range(rank))
            or not all(strides[i] % 16 == 0 and strides[i] < 2**40 for i in range(rank - 1))
            or width % 16
            or (swizzle and width > (32, 64, 128)[swizzle - 1])
        )
        return _INVALID_VALUE if wrong else _SUCCESS


def _answering(function: Callable) -> Callable:
    """The function; an exception, which ctypes would print and forget, ends the process."""

    def call(*arguments):
        try:
            return int(function(*arguments))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(3)

    return call


def _built(folder: Path, include: Path) -> Path:
    library = folder / "libcuda.so.1"
    if not library.exists():
        scratch = folder / f"{os.getpid()}.so"
        command = [COMPILER, "-shared", "-fPIC", "-O1", f"-I{include}", str(SOURCE), "-o", scratch]
        subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], check=True)
        with contextlib.suppress(FileExistsError):
            scratch.rename(library)
    return library
