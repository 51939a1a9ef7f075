"""The machine of ``machine/``, compiled the first time it is needed and called through ctypes."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_char_p, c_int32, c_uint32, c_uint64, c_void_p
from pathlib import Path

SOURCES = Path(__file__).parent / "machine"
# -march=native makes code for this machine alone: what it can do is part of the name under which the library is kept.
FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-type-limits"]


def compiler() -> str:
    """The C++ compiler, or an error that names it."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise FileNotFoundError(f"no C++ compiler: {name} is not on PATH")
    return name


def kept(name: str, *parts: str | bytes) -> Path:
    """A folder of the system's temporary folder for what is made from ``parts``; it may be there already."""
    key = hashlib.sha256(b"\0".join(part.encode() if isinstance(part, str) else part for part in parts))
    folder = Path(tempfile.gettempdir()) / f"quietstar-{name}-{os.getuid()}" / key.hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compile_library(target: Path, sources: list[Path], flags: list[str], link: list[str] = ()) -> None:
    """Compile ``sources`` to the shared library ``target``; other processes may be doing the same."""
    scratch = Path(tempfile.mkdtemp(dir=target.parent))

    def compiled(source: Path) -> Path:
        object_file = scratch / f"{source.name}.o"
        subprocess.run([compiler(), *flags, "-x", "c++", "-c", source, "-o", object_file], check=True)
        return object_file

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([compiler(), "-shared", *objects, *link, "-o", scratch / target.name], check=True)
    (scratch / target.name).replace(target)  # at once: another process may be about to load it
    shutil.rmtree(scratch)


@functools.cache
def library() -> ctypes.CDLL:
    """The machine; compiles it if its sources have changed."""
    sources = sorted(SOURCES.glob("*.*"))
    command = [compiler(), "-march=native", "-Q", "--help=target"]
    machine = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    path = kept("ptx", repr([command, FLAGS]), machine, *(source.read_bytes() for source in sources)) / "machine.so"
    if not path.exists():
        compile_library(path, [source for source in sources if source.suffix == ".cpp"], FLAGS)
    loaded = ctypes.CDLL(str(path))
    loaded.ptx_count_name.restype = c_char_p
    loaded.ptx_count_name.argtypes = [c_int32]
    loaded.ptx_new.restype = c_void_p
    loaded.ptx_new.argtypes = [c_void_p, c_uint64]
    loaded.ptx_free.argtypes = [c_void_p]
    loaded.ptx_add_special.argtypes = [c_void_p, c_int32, c_int32]
    loaded.ptx_add_instruction.argtypes = [c_void_p, c_char_p, *[c_int32] * 8, c_void_p, c_void_p]
    loaded.ptx_launch.argtypes = [
        c_void_p, c_void_p, c_void_p, c_uint32, c_uint32, c_char_p, c_uint32, c_void_p, c_int32, c_int32, c_int32,
        c_uint64, c_void_p, c_int32,
    ]  # fmt: skip
    loaded.ptx_counts.restype = POINTER(c_uint64)
    loaded.ptx_counts.argtypes = [c_void_p]
    loaded.ptx_instruction_counts.restype = POINTER(c_uint64)
    loaded.ptx_instruction_counts.argtypes = [c_void_p, c_int32]
    loaded.ptx_failure.restype = c_char_p
    loaded.ptx_failure.argtypes = [c_void_p]
    loaded.ptx_finding_count.argtypes = [c_void_p]
    loaded.ptx_finding.argtypes = [c_void_p, c_int32, *[c_void_p] * 5]
    return loaded


@functools.cache
def count_names() -> list[str]:
    """What the machine counts: Count of machine.h."""
    names = iter(range(1000))
    return [name.decode() for name in iter(lambda: library().ptx_count_name(next(names)), None)]
