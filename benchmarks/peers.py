"""Other implementations of what the vocabulary ops do: those installed here, and why the others are missing.

Heads' cross-entropies take hidden [rows, H], weight [V, H] and target [rows] and return the mean; none of them mixes
two predictions, so for that the mixed hidden states are written before. Imports are within the functions: whatever goes
wrong with one peer is the reason it is missing, and no reason to miss the others.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from measure import DEVICE
from torch import Tensor
from torch.nn import functional as F

from quietstar.ops._backend import BACKENDS

Result = TypeVar("Result")
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

PLAIN = "plain PyTorch"
COMPILED = "torch.compile of plain"
OUR_TORCH = "our torch backend"  # library calls: a peer of the backends with kernels
FUSED = [name for name in BACKENDS if name not in ("reference", "torch")]
UNTOLD_MEMORY = () if DEVICE == "cuda" else (COMPILED,)  # a process that compiles shows the compiler's memory


def plain_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """All logits at once, the cross-entropy in float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For the shapes of its first call: those of earlier benchmarks would have made it general, and slower."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _torch_chunked() -> Loss:
    """Of recent versions of torch; on a CPU their own choice, chunks of 16 rows, would take eight times as long."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=1024 if DEVICE == "cpu" else None)
    return lambda hidden, weight, target: F.linear_cross_entropy(hidden, weight, target, options=options)


def _liger() -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, target: liger_fused_linear_cross_entropy(
        hidden, weight, target, accum_dtype=torch.float32
    )


def _cut_cross_entropy() -> Loss:
    _needs_a_gpu()
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def _quack() -> Loss:
    _needs_a_gpu()
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


def _needs_a_gpu() -> None:
    if DEVICE != "cuda":
        raise RuntimeError("needs a GPU")


LINEAR_CROSS_ENTROPY: dict[str, Callable[[], Loss]] = {
    PLAIN: lambda: plain_cross_entropy,
    COMPILED: lambda: compiled(plain_cross_entropy),
    "torch's chunked linear_cross_entropy": _torch_chunked,
    "liger-kernel": _liger,
    "cut-cross-entropy": _cut_cross_entropy,
    "quack-kernels": _quack,
}


def assert_same_task(name: str, theirs: Tensor, truth: Tensor) -> None:
    """A peer's answer is the one asked for. For how it rounds, and what it drops, it answers itself."""
    error = ((theirs.detach() - truth.detach()).norm() / truth.detach().norm()).item()
    assert error < 0.05, f"{name} is off by {error:.1e} of its norm"


def present(names: Iterable[str], trial: Callable[[str], Result]) -> tuple[dict[str, Result], dict[str, str]]:
    """What ``trial`` returns for each name or, in the second dict, the first line of the error it ends with."""
    found, missing = {}, {}
    for name in names:
        try:
            found[name] = trial(name)
        except Exception as error:  # of any kind: it is somebody else's code, on a machine it may not know
            missing[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return found, missing
