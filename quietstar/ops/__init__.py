"""Autograd ops of Quiet-STaR, usable by any trainer: only torch is needed.

Every op takes ``backend``: None or "auto" is the fastest that can run on the inputs, a name insists on one and raises
a ValueError that says what is missing. Of a list, "cuda,triton,torch", the first that can run is taken; it may end in
"auto". The environment variable ``QUIETSTAR_BACKEND``, of the same form, sets the default.

=========== ============================== ==============================================================
name        runs on                        what it is
=========== ============================== ==============================================================
reference   anything                       the specification: shortest readable PyTorch, never fast
torch       anything                       library kernels, in blocks that keep memory small
triton      GPU (interpreter: for tests)   fused kernels
cuda        CUDA, not float64              kernels of the compiled module; thought_attention's forward
cpu         CPU, float32 and bfloat16      C++ kernels of the compiled module
=========== ============================== ==============================================================

NVIDIA's GPUs have what the kernels of triton and cuda need from compute capability 8.0 on (bfloat16 products, copies in
the background); those of cuda must have been compiled for the GPU. It is the device of the tensors that counts. AMD's
GPUs are not tested: triton is not refused there, cuda is.

Values of index tensors (token ids, anchors) are checked on the CPU. On CUDA that would wait for the device: there they
are checked only with ``QUIETSTAR_CHECK_VALUES=1``, to debug.
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
