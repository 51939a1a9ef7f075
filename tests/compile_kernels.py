"""What Triton kernels compile to, for GPUs that need not be there.

``compiled(script, function)`` runs ``function`` of a Python file in a process of its own for every architecture. There,
kernels are compiled as they are launched, with the very arguments and options of the launch, on CPU tensors; none is
run. The function calls what launches the kernels and ignores the results, which are garbage. ``"function:64"`` hands
the number to it.

``launched(script, *functions)`` does the same in a tenth of the time, up to Triton's own intermediate code.
"""

import functools
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from versions import version_of

# Compute capability: the most shared memory a program may use there, in bytes.
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# The same for a consumer's GPU, which has fewer kernels to itself.
GEFORCE = {86: 99 << 10}


class Kernel(NamedTuple):
    """One compiled specialisation of a kernel."""

    name: str
    architecture: int
    warps: int
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of stack of a thread: where registers went that did not fit, and arrays indexed at run time."""
    shared: int
    """Bytes of shared memory of a program."""
    ptx: str


def spill_limit(dtype: torch.dtype = torch.bfloat16) -> int:
    """The most bytes that a kernel may spill; in half precision none, but with the compilers of old versions of Triton.

    Those spill streaming_kernel (8 bytes); 3.6 also the
    gradients of thought attention (sm_90 and sm_100, heads of 128: up to 16); 3.7 also its key gradient (sm_80, heads
    of 256: 8) and query gradient (sm_100, heads of 64: 24). Tiles that do not would be smaller. In float32, without
    tensor cores, a few spilled registers are the lesser evil.
    """
    version = version_of("triton")
    if dtype == torch.float32:
        return 288 if version == (3, 6) else 280
    return {(3, 6): 16, (3, 7): 24}.get(version, 0)


def is_serialised(kernel: Kernel) -> bool:
    """Whether ptxas makes each wgmma of a kernel wait for the one before: it says so by a warning, C7510 to C7519."""
    if "wgmma" not in kernel.ptx:
        return False
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.ptx)
        target = re.search(r"^\.target (\w+)", kernel.ptx, re.M)[1]
        command = [get_ptxas(kernel.architecture).path, "-v", f"--gpu-name={target}", source, "-o", f"{folder}/cubin"]
        said = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr
    assert kernel.name in said, said  # -v was understood, so that silence means something
    return re.search(r"\bC75\d\d\b", said) is not None


class Launch(NamedTuple):
    """One launch of a kernel."""

    name: str
    ttir: str
    """Triton's own intermediate code, optimised."""
    options: list[str]
    """Names of the options the launch gives."""


@functools.cache
def launched(script: str, *functions: str) -> list[Launch]:
    """The launches that ``functions`` of the file ``script`` make, for a Hopper GPU."""
    return [Launch(*fields) for fields in _in_its_own_process(script, ",".join(functions), 90, "ttir")]


@functools.cache
def compiled(script: str, function: str, architectures: tuple[int, ...] = (80, 90, 100)) -> dict[int, list[Kernel]]:
    """The kernels that ``function`` of the file ``script`` launches, by architecture, one on each core."""
    with ThreadPoolExecutor(os.cpu_count()) as processes:
        kernels = processes.map(functools.partial(_compiled_for, script, function), architectures)
        return dict(zip(architectures, kernels, strict=True))


def _compiled_for(script: str, function: str, architecture: int) -> list[Kernel]:
    return [Kernel(*fields) for fields in _in_its_own_process(script, function, architecture, "cubin")]


def _in_its_own_process(script: str, function: str, architecture: int, stage: str) -> list[list]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(["", *sys.path])
    command = [sys.executable, __file__, script, function, str(architecture), stage]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, "see stderr"
    return json.loads(done.stdout.splitlines()[-1])


class _StopError(Exception):
    """Ends the compilation of a kernel behind its first stage."""


def _stop_behind_ttir() -> None:
    from triton.backends.nvidia.compiler import CUDABackend

    add_stages = CUDABackend.add_stages

    def add_first_stage(self, stages, *arguments):
        add_stages(self, stages, *arguments)
        name, make = next(iter(stages.items()))  # "ttir"; Gluon's has another name

        def stop(*arguments):
            raise _StopError(str(make(*arguments)))

        stages[name] = stop

    CUDABackend.add_stages = add_first_stage


def pretend_gpu(architecture: int) -> None:
    """Let Triton compile for ``architecture`` in this process, whatever is in the machine."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: architecture,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", architecture, 32),
            utils=SimpleNamespace(
                get_device_properties=lambda device: {"max_shared_mem": (SHARED_MEMORY | GEFORCE)[architecture]}
            ),
        )
    )


def _compile_launches(script: str, function: str, architecture: int, stage: str) -> list[Kernel] | list[Launch]:
    from triton.runtime.jit import JITFunction

    functions = runpy.run_path(script)
    found, launches = {}, []
    run = JITFunction.run

    def only_compile(self, *args, grid, warmup, **options):
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        except _StopError as stopped:
            launches.append(Launch(self.__name__, str(stopped), list(options)))
            return None
        if stage == "ttir":  # compiled before, and kept
            code = next(kernel.asm[name] for name in ("ttir", "ttgir") if name in kernel.asm)
            launches.append(Launch(self.__name__, code, list(options)))
        found[kernel.hash] = kernel
        return kernel

    JITFunction.run = only_compile
    if stage == "ttir":
        _stop_behind_ttir()
    pretend_gpu(architecture)
    for call in function.split(","):
        name, *numbers = call.split(":")
        functions[name](*map(int, numbers))
    return launches if stage == "ttir" else [_kernel(kernel) for kernel in found.values()]


def _kernel(kernel) -> Kernel:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    count = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    meta = kernel.metadata
    return Kernel(
        meta.name, meta.target.arch, meta.num_warps, count["REG"], count["STACK"] + count["LOCAL"], meta.shared,
        kernel.asm["ptx"],
    )  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(_compile_launches(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])))
