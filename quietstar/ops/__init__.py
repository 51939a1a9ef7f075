"""Autograd ops of Quiet-STaR, usable by any trainer: only torch is needed.

Every op takes ``backend``: None or "auto" is the fastest that can run on the inputs, a name insists on one and raises
a ValueError that says what is missing. The environment variable ``QUIETSTAR_BACKEND`` sets the default.

=========== ============================== ==============================================================
name        runs on                        what it is
=========== ============================== ==============================================================
reference   anything                       the specification: shortest readable PyTorch, never fast
torch       anything                       library kernels, in blocks that keep memory small
triton      CUDA (interpreter: for tests)  fused kernels
cuda        CUDA, not float64              kernels of the compiled module; thought_attention forward only
cpu         CPU, float32 and bfloat16      C++ kernels of the compiled module
=========== ============================== ==============================================================

Values of index tensors (token ids, anchors) are checked on the CPU. On CUDA that would wait for the device: there they
are checked only if ``QUIETSTAR_CHECK_VALUES`` is set, to debug.
"""

from quietstar.ops.linear_cross_entropy import linear_cross_entropy, mixed_linear_cross_entropy
from quietstar.ops.linear_sample import linear_sample
from quietstar.ops.mixing import mix_logits, mixed_cross_entropy
from quietstar.ops.thought_attention import thought_attention

__all__ = [
    "linear_cross_entropy",
    "linear_sample",
    "mix_logits",
    "mixed_cross_entropy",
    "mixed_linear_cross_entropy",
    "thought_attention",
]
