"""What stands for CUDA's opaque descriptor of a tensor, in the 128 bytes of its parameter."""

import struct
from collections.abc import Sequence

import torch

SWIZZLES = {"none": 0, "32 bytes": 1, "64 bytes": 2, "128 bytes": 3}
_MAGIC = 0x50414D5254584D54  # kTensorMapMagic of machine.h
_TYPES = {  # CUtensorMapDataType of CUDA's driver interface
    torch.uint8: 0, torch.int8: 0, torch.int16: 1, torch.uint16: 1, torch.uint32: 2, torch.int32: 3, torch.uint64: 4,
    torch.int64: 5, torch.float16: 6, torch.float32: 7, torch.float64: 8, torch.bfloat16: 9,
}  # fmt: skip


def tensor_map(
    tensor: torch.Tensor, shape: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzle: int
) -> bytes:
    """TensorMap of machine.h for the memory of ``tensor``; sizes and strides of elements, the innermost last."""
    size, rank = tensor.element_size(), len(shape)

    def five(values: Sequence[int], scale: int = 1) -> list[int]:
        return [int(value) * scale for value in reversed(values)] + [0] * (5 - rank)

    return struct.pack(
        "<QQ5Q5Q5I2H2I", _MAGIC, tensor.data_ptr(), *five(shape), *five(strides, size), *five(box), rank, swizzle, size,
        _TYPES[tensor.dtype],
    )  # fmt: skip
