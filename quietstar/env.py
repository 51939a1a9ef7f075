"""`quietstar env`: reports what is installed and what this machine can run, for bug reports.

The report never fails: if something cannot be determined, its line says why, and the rest is still reported.
"""

import os
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import quietstar
from quietstar._command_line import SuggestingParser

PACKAGES = ("triton", "transformers", "numpy", "safetensors", "accelerate", "datasets", "tokenizers")
# The smallest inputs with which each op can be run.
SHAPES = {
    "query": (1, 1, 1, 1, 16),
    "key": (1, 1, 1, 16),
    "hidden": (1, 16),
    "weight": (8, 16),
    "logits": (1, 8),
    "mixing_weight": (1,),
    "target": (1,),
}
OPS = {
    "thought_attention": ("query", "key", "key", "query", "query"),
    "mix_logits": ("logits", "logits", "mixing_weight"),
    "mixed_cross_entropy": ("logits", "logits", "mixing_weight", "target"),
    "linear_cross_entropy": ("hidden", "weight", "target"),
    "mixed_linear_cross_entropy": ("hidden", "hidden", "mixing_weight", "weight", "target"),
    "linear_sample": ("hidden", "weight"),
}


def environment() -> dict[str, str]:
    """Return the report: label -> one line of text, in the order in which it is printed."""
    probes: dict[str, Callable[[], str]] = {
        "quietstar": lambda: f"{quietstar.__version__} in {Path(quietstar.__file__).parent}",
        "python": lambda: f"{platform.python_version()} on {platform.platform()}",
        "torch": _torch,
        **{package: lambda package=package: _version(package) for package in PACKAGES},
        "cpu": _cpu,
        "cuda": _cuda,
        "quietstar._C": _compiled_module,
        **{name: lambda name=name: os.environ.get(name, "not set") for name in ("QUIETSTAR_BACKEND", "QUIETSTAR_LOG")},
        **{op: lambda op=op: _backends(op) for op in OPS},
        "thought_attention.forward": _attention_forward,
    }
    return {label: _answer(probe) for label, probe in probes.items()}


def _answer(probe: Callable[[], str]) -> str:
    try:
        return probe()
    except Exception as error:  # anything may be broken on a machine that needs a bug report
        return f"unknown ({_one_line(error)})"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _torch() -> str:
    try:
        import torch
    except Exception:  # a torch that cannot be imported: its version matters all the more
        return _version("torch")
    return torch.__version__  # includes the kind of build, which the package's version may leave out


def _cpu() -> str:
    import torch

    return f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"no device (torch built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU only'})"
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    built = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{built}: " + "; ".join(
        f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB" for device in devices
    )


def _compiled_module() -> str:
    try:
        from quietstar import _C
    except ImportError as error:
        return f"not available ({error}); `pip install .` builds it"
    built = _C.build_info()
    cuda = f"CUDA {built['cuda']} for {built['cuda_architectures']}" if built["cuda"] else "no CUDA"
    openmp = f"OpenMP {built['openmp']}" if built["openmp"] else "no OpenMP"
    return f"{built['compiler']}, {built['cxx_standard']}, {openmp}, {cuda}"


def _backends(op: str) -> str:
    return _by_device(lambda device: ", ".join(_usable(op, device)) or "none", ["cpu", *_gpus()])


def _attention_forward() -> str:
    """Report which Triton kernel runs the attention forward in training, and why not the better one."""
    return _by_device(_attention_kernel, _gpus()) or "no GPU"


def _attention_kernel(device: str) -> str:
    import torch

    from quietstar.ops._availability import triton_unavailable
    from quietstar.ops.thought_attention.inputs import Inputs, Mask

    rows, keys = (torch.zeros(1, 1, *sizes, 128, dtype=torch.bfloat16, device=device) for sizes in ((1, 1), (1,)))
    if reason := triton_unavailable(rows):
        return f"none of Triton's ({reason})"
    from quietstar.ops.thought_attention import gluon_launch

    inputs = Inputs(rows, keys, keys, rows, rows)
    reason = gluon_launch.unavailable(inputs, Mask.of(inputs))
    return f"Triton (Gluon for Hopper {reason})" if reason else "Gluon for Hopper"


def _gpus() -> list[str]:
    import torch

    return [f"cuda:{index}" for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]


def _by_device(describe: Callable[[str], str], names: list[str]) -> str:
    devices: dict[str, list[str]] = {}  # by description, since the GPUs of a machine may differ
    for device in names:
        devices.setdefault(describe(device), []).append(device)
    return "; ".join(f"{', '.join(alike)}: {said}" for said, alike in devices.items())


def _usable(op: str, device: str) -> list[str]:
    """Return the backends that can run ``op`` on ``device``, found by running it."""
    import torch

    from quietstar import ops
    from quietstar.ops._backend import BACKENDS

    function = getattr(ops, op)
    inputs = [
        torch.zeros(SHAPES[name], dtype=torch.int64 if name == "target" else torch.float32, device=device)
        for name in OPS[op]
    ]
    options = {"seed": 0} if op == "linear_sample" else {}
    usable = []
    for backend in BACKENDS:
        try:
            function(*inputs, **options, backend=backend)
        except ValueError:  # raised by the op if this backend cannot run here
            continue
        except Exception as error:
            usable.append(f"{backend} fails ({_one_line(error)})")
        else:
            usable.append(backend)
    return usable


def main(argv: Sequence[str]) -> int:
    """Print the report and return the exit code."""
    SuggestingParser(prog="quietstar env", description="Print versions, devices and backends.").parse_args(argv)
    report = environment()
    width = max(map(len, report))
    for label, text in report.items():
        print(f"{label:<{width}}  {text}")
    return 0
