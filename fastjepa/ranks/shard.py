"""The part of a tensor that a rank holds.

Shards are cut from the flattened tensor. A weight of shape (2, 5) whose 10 elements are shared by 2 ranks after element 6
is Piece(tensor of 6 elements, start 0, shape (2, 5)) on rank 0 and Piece(tensor of 4, start 6, shape (2, 5)) on rank 1.
"""

from collections.abc import Iterable, Mapping
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
    """The part of a tensor that a rank holds, as a view of what trains: writing to it changes the run."""

    tensor: Tensor  # (n,) of the flattened tensor from `start`; the tensor itself where every rank has all of it
    start: int
    shape: tuple[int, ...]  # of the whole tensor
    everywhere: bool = False  # whether every rank has all of it

    @classmethod
    def all_of(cls, tensor: Tensor) -> "Piece":
        """Return the piece that is a whole tensor, which every rank has."""
        return cls(tensor, 0, tuple(tensor.shape), everywhere=True)

    @property
    def form(self) -> TensorForm:
        """Return the dtype and shape of the whole tensor."""
        return DTYPE_NAMES[self.tensor.dtype], self.shape


def element_count(shape: Iterable[int]) -> int:
    """Return how many elements a tensor of this shape has; 1 for ()."""
    return torch.Size(shape).numel()


def forms_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorForm]:
    """Return the dtype and shape of each tensor."""
    return {name: Piece.all_of(tensor).form for name, tensor in tensors.items()}
