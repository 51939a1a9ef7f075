"""When the kernels in Gluon run, and the tensor maps by which the TMA unit reads for them.

They are for Hopper, in half precision, with a Triton that has what they are written in. Everything else, and what this
file gives a reason for, is for the kernels of ``triton_forward`` and its neighbours.
"""

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quietstar.ops import _launch_table
from quietstar.ops._availability import interpreted
from quietstar.ops.thought_attention import triton_launch as launch
from quietstar.ops.thought_attention.inputs import Inputs, Mask, Result

if TYPE_CHECKING:
    from quietstar.ops.thought_attention.backend_triton import _Seen


class Tile(NamedTuple):
    """Launch parameters of the forward."""

    block_m: int
    """Query rows of a program, half of them for each group of consumers."""
    block_n: int
    """Keys in a block."""
    stages: int
    """Blocks of keys, and of values, in shared memory."""


# By padded head size. Of 227 KiB of shared memory queries take 16 and 32, a stage 32 and 64.
TILES = {64: Tile(128, 128, 3), 128: Tile(128, 128, 2), 256: Tile(128, 64, 2)}

# With fewer rows of a key/value head half of the consumers would have nothing to do.
LEAST_ROWS = 128

_LEAST_TRITON = 3, 8
_LARGEST_HEAD = 256  # of the forward; gradients hold two or three times as much in shared memory
_LARGEST_HEAD_OF_GRADIENTS = 128
# Of addresses, and of the distances of what is not side by side.
_TMA_BYTES = 16
# Keys and values of heads whose programs run at the same time: they are to stay in the L2 cache, which has 50 MB.
_TOGETHER_BYTES = 24 << 20


def unavailable(inputs: Inputs, mask: Mask) -> str | None:
    """Why the kernels in Gluon cannot run, in one clause; None if they can."""
    query = inputs.query
    with torch.cuda.device_of(query):
        reason = _unavailable_here()
    if reason is not None:
        return reason
    if query.element_size() != 2:
        return f"needs bfloat16 or float16, got {query.dtype}"
    for name, tensor in (("D", query), ("Dv", inputs.value)):
        size = tensor.shape[-1]
        if size % 8 or size > _LARGEST_HEAD:
            return f"needs heads of a multiple of 8 elements, at most {_LARGEST_HEAD}, got {name} = {size}"
    for name, tensor in zip(inputs._fields, inputs, strict=True):
        if name != "query" and not readable_by_tma(tensor):
            return f"needs vectors of {name} {_TMA_BYTES} bytes, or a multiple, apart, got strides {tensor.stride()}"
    return None


def gradients_unavailable(query: Tensor, grad_output: Tensor) -> str | None:
    """Why the kernels of gradients cannot run where that of the forward can; None if they can."""
    largest = max(query.shape[-1], grad_output.shape[-1])
    if largest <= _LARGEST_HEAD_OF_GRADIENTS:
        return None
    return f"needs heads of at most {_LARGEST_HEAD_OF_GRADIENTS} elements, got {largest}"


def _unavailable_here() -> str | None:
    """The same for everything, on the current device."""
    if _interpreted():
        return "is not for Triton's interpreter"
    if _launch_table.architecture() != _launch_table.HOPPER:
        return "needs a GPU of compute capability 9.0"
    return _triton_too_old()


def _interpreted() -> bool:
    """Now, or when Triton was imported: it then decided so of its own functions."""
    return interpreted() or not isinstance(tl.max, triton.JITFunction)


@functools.cache
def _triton_too_old() -> str | None:
    if tuple(map(int, triton.__version__.split(".")[:2])) >= _LEAST_TRITON:
        return None
    return f"needs Triton >= {'.'.join(map(str, _LEAST_TRITON))}, found {triton.__version__}"


def readable_by_tma(tensor: Tensor) -> bool:
    """Whether there is a tensor map of it: strides of dimensions of size 1 say nothing, and 0 is none."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    bytes_apart = [stride * tensor.element_size() for stride in strides[:-1]]
    return (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % _TMA_BYTES == 0
        and all(apart > 0 and apart % _TMA_BYTES == 0 for apart in bytes_apart)
    )


def forward(
    vectors: Inputs, mask: Mask, seen: "_Seen", scale: float, curve_scale: float | None, result: Result
) -> None:  # fmt: skip
    """Compute ``result``; the arguments as ``backend_triton`` has them for ``triton_forward.forward_kernel``."""
    from quietstar.ops.thought_attention.gluon_forward import gluon_forward_kernel
    from quietstar.ops.thought_attention.gluon_pipeline import tensor_map

    query, key, value, thought_key, thought_value = seen_values(vectors, mask, seen)
    batch, _, num_anchors, steps, head = query.shape
    kv_heads, length, value_head = value.shape[1:]
    thought_steps, group = vectors.thought_steps, vectors.group
    block_d, block_v = (max(64, launch.padded_head(size)) for size in (head, value_head))
    tile = TILES[max(block_d, block_v)]
    box = max(8, min(tile.block_n // 2, launch.power_of_2(thought_steps)))
    anchors = launch.most_anchors(steps * group, tile.block_m // 2)
    boxes = min(tile.block_n // 2 // box, max(16 // box, launch.power_of_2(anchors)))
    keys, values = ((1, 1, tile.block_n, block) for block in (block_d, block_v))
    thoughts = (1, 1, 1, box, 64)
    maps = map(tensor_map, (key, value, thought_key, thought_value), (keys, values, thoughts, thoughts))
    together = max(1, _TOGETHER_BYTES // (length * (head + value_head) * query.element_size()))
    gluon_forward_kernel[(batch * kv_heads * triton.cdiv(num_anchors * steps * group, tile.block_m),)](
        query, *maps, seen.anchors, seen.order, seen.thought_lengths, seen.key_start, *result,
        query.stride(), result.lse.stride(), seen.batch_stride, kv_heads, batch * kv_heads, together, num_anchors,
        length, thought_steps, triton.cdiv(thought_steps, box), seen.window, seen.step_window,
        base_2(scale), curve_scale,
        STEPS=steps, GROUP=group, CAUSAL=mask.causal, PER_ANCHOR=seen.start_per_anchor, HEAD=head, BLOCK_D=block_d,
        VALUE_HEAD=value_head, BLOCK_V=block_v, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BOX_T=box,
        THOUGHT_ANCHORS=boxes, GROUP_ANCHORS=anchors, STAGES=tile.stages, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def base_2(scale: float) -> float:
    """See ``triton_tiles``."""
    return max(scale, 1e-30) * math.log2(math.e)


def seen_values(inputs: Inputs, mask: Mask, seen: "_Seen") -> Inputs:
    """The inputs with zeros for the values of keys that no row sees, which may be NaN: a product would spread it.

    Kernels leave out what is beyond the tensors and what is of inactive anchors.
    """
    _, _, value, _, thought_value = inputs
    hidden_steps = inputs.thought_steps - inputs.steps
    if mask.anchors is not None or mask.key_start is not None or seen.anchors is not None or seen.step_window:
        value = torch.where(_seen_base_keys(inputs, mask, seen)[:, None, :, None], value, 0)
    if mask.thought_lengths is not None or seen.step_window is not None:
        step = torch.arange(inputs.thought_steps, device=value.device)
        visible = step >= 0
        if seen.step_window is not None:
            visible = step > hidden_steps - seen.step_window
        if mask.thought_lengths is not None:
            visible = visible & (step < mask.thought_lengths[:, None, :, None])
        thought_value = torch.where(visible[..., None], thought_value, 0)
    return inputs._replace(value=value, thought_value=thought_value)


def _seen_base_keys(inputs: Inputs, mask: Mask, seen: "_Seen") -> Tensor:
    """Whether some row sees a base key: bool [1 or B, L]."""
    length, device = inputs.key.shape[2], inputs.key.device
    keys = torch.arange(length, device=device)[None]
    anchors = keys if seen.anchors is None else seen.anchors  # ascending
    first = torch.zeros_like(anchors)
    if seen.window is not None:
        first = anchors + (1 - seen.window)
    if seen.step_window is not None:
        first = anchors + (mask.window_offset(inputs.steps, inputs.thought_steps) + 1 - seen.step_window)
    if seen.key_start is not None:
        first = first.maximum(seen.key_start if seen.start_per_anchor else seen.key_start[:, None])
    first = torch.where(anchors < 0, length, first)
    # The lowest first key of all anchors that are not in front of a key.
    lowest = torch.nn.functional.pad(first.flip(1).cummin(1).values.flip(1), (0, 1), value=length)
    behind = torch.searchsorted(anchors, keys.expand(len(anchors), -1).contiguous())
    return lowest.gather(1, behind.expand(len(lowest), -1)) <= keys
