"""Distances on the grid of patches, from every patch to the nearest one of a mask."""

import numpy as np

from fastjepa.masks.layouts import Grid


def distances_to(mask: np.ndarray, grid: Grid) -> np.ndarray:
    """Return (b, N) distances, in patches, of each patch's middle to that of the nearest patch of a (b, N) bool mask.

    Rows first, then columns: the squares add up. Where a mask holds no patch they are infinite. Example: of 2 rows and 3
    columns the mask of patch 0 has the distances 0, 1, 2 and 1, 1.41, 2.24.
    """
    rows, columns = grid
    inside = mask.reshape(-1, rows, 1, columns)
    across = np.where(inside, _squares(columns), np.inf).min(axis=3)  # (b, rows, columns): within the patch's own row
    down = across[:, None] + _squares(rows)[:, :, None]  # (b, row, other row, column)
    return np.sqrt(down.min(axis=2)).reshape(mask.shape)


def visible_weights(target_mask: np.ndarray, grid: Grid, weight: float) -> np.ndarray:
    """Return (b, N), what a visible patch counts in the loss: `weight` over the root of its distance to the nearest patch of
    any target block of its image, which is taken to be 1 at least, for a context may overlap them.

    Example: 4 patches away, a patch counts half of the weight.
    """
    return weight / np.sqrt(np.maximum(distances_to(target_mask.any(axis=1), grid), 1.0))


def _squares(side: int) -> np.ndarray:
    place = np.arange(side, dtype=np.float32)
    return (place[:, None] - place) ** 2
