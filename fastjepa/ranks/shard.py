"""A rank's part of a tensor."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

TensorForm = tuple[str, tuple[int, ...]]  # dtype as safetensors names it, and shape

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class Piece(NamedTuple):
    """A rank's part of a tensor, as a view of what trains: writing to it changes the run."""

    tensor: Tensor  # (n,) of the flattened tensor from `start`; the tensor itself where every rank has all of it
    start: int
    shape: tuple[int, ...]  # of the whole tensor
    everywhere: bool = False  # whether every rank has all of it

    @classmethod
    def all_of(cls, tensor: Tensor) -> "Piece":
        return cls(tensor, 0, tuple(tensor.shape), everywhere=True)

    @property
    def form(self) -> TensorForm:
        return DTYPE_NAMES[self.tensor.dtype], self.shape


def element_count(shape: Iterable[int]) -> int:
    return torch.Size(shape).numel()
