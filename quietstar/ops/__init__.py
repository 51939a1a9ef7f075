"""Differentiable ops of Quiet-STaR. They need only torch, so any trainer can use them.

Every op has an argument ``backend``. None or "auto" picks the fastest backend that can run on the inputs. A name
requires that backend; if it cannot run, a ValueError says what is missing. From a list such as "cuda,triton,torch", the
first backend that can run is used; a list may end in "auto". The environment variable ``QUIETSTAR_BACKEND`` takes the
same values and sets the default.

=========== ============================== ==============================================================
name        runs on                        what it is
=========== ============================== ==============================================================
reference   anything                       the specification: shortest readable PyTorch, never fast
torch       anything                       library kernels, in blocks that keep memory small
triton      GPU (interpreter: for tests)   fused kernels
cuda        CUDA, not float64              kernels of the compiled module; thought_attention's forward
cpu         CPU, float32 and bfloat16      C++ kernels of the compiled module
=========== ============================== ==============================================================

The triton and cuda backends need an NVIDIA GPU of compute capability 8.0 or newer (bfloat16 matrix products,
asynchronous copies), and cuda must have been compiled for that GPU. The device of the input tensors decides. AMD GPUs
are not tested: triton may be tried there, cuda is refused.

Values of index tensors (token ids, anchors) are checked on the CPU. On CUDA a check would wait for the device, so they
are checked there only with ``QUIETSTAR_CHECK_VALUES=1``, for debugging.
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
