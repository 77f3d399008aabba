"""The grid of patches that stored positions belong to, found by comparison with sine-cosine positions."""

import torch
from torch import Tensor

from fastjepa.model.positions import sincos_positions

HALVES = (torch.float16, torch.bfloat16)


def possible_grids(patches: int) -> list[tuple[int, int]]:
    """Return all (rows, columns) of so many patches, the most nearly square first: 8 is 2x4, 4x2, 1x8, 8x1."""
    found = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    return sorted(found, key=lambda grid: abs(grid[0] - grid[1]))


def grid_of_positions(stored: Tensor) -> tuple[int, int] | None:
    """Return the grid (rows, columns) whose sine-cosine positions (1, N, D) are stored; None where they were learned.

    The comparison is as exact as the stored values are, for a file in bf16, or one that once was, holds rounded values.
    """
    if stored.ndim != 3 or not stored.is_floating_point() or stored.shape[2] % 4:
        return None
    relative, absolute = precision_of(stored)
    for grid in possible_grids(stored.shape[1]):
        if torch.allclose(stored.float(), sincos_positions(stored.shape[2], grid), rtol=relative, atol=absolute):
            return grid
    return None


def precision_of(stored: Tensor) -> tuple[float, float]:
    """Return the (relative, absolute) error that the rounding of stored values in -1..1 explains.

    A bf16 number is off by at most 2^-8 of itself. Values may have been rounded in fp16 before: 2^-12 more. A tensor in
    fp32 may hold bf16 numbers, so that values are asked and not their dtype.
    """
    rounded = [half for half in HALVES if bool((stored.to(half).to(stored.dtype) == stored).all())]
    if not rounded and stored.dtype.itemsize >= 4:
        return 0.0, 1e-4
    return max(torch.finfo(dtype).eps / 2 for dtype in (stored.dtype, *rounded)), 5e-4
