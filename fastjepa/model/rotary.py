"""Rotary positions in two dimensions: queries and keys are turned by angles that grow with row and column.

A product of a turned query and a turned key depends on where the two patches lie to each other alone (Su et al., 2021,
section 3.4). Coordinates and periods are those of DINOv3 (Simeoni et al., 2025, appendix): fractions of the grid, so that a
grid of another size or shape spans the same angles.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LONGEST_PERIOD = 100.0  # of a channel pair, in halves of the grid; the shortest is 1


class Rotation(NamedTuple):
    """Cosine and sine of the angles of some rows, each (T, 1, d / 2) fp32."""

    cos: Tensor
    sin: Tensor

    def of_rows(self, idx: Tensor) -> "Rotation":
        """Return the rotation of rows that are copies of the rows `idx`."""
        return Rotation(self.cos.index_select(0, idx), self.sin.index_select(0, idx))


def grid_rotation(head_dim: int, grid: tuple[int, int], device: torch.device, shift: tuple[float, float] = (0, 0)) -> Rotation:
    """Return the rotation of the N patches of a grid, for heads of `head_dim` channels, a multiple of 4.

    Half of the angles are of the row, half of the column. A coordinate c, from -1 to 1 over the centres of the patches, has
    the angles 2 pi c / period, with periods from 1 to LONGEST_PERIOD. Example: on a 2 x 4 grid with 8 channels the periods
    are 1 and 10, and the patch in row 0 and column 3, at (-0.5, 0.75), has the angles -pi, -pi / 10, 1.5 pi and 0.15 pi.

    Args:
        shift: what is added to every row and column, in the same fractions.
    """
    quarter = head_dim // 4
    period = LONGEST_PERIOD ** (torch.arange(quarter, device=device) / quarter)
    ends = [(torch.arange(n, device=device) + 0.5) * (2 / n) - 1 + by for n, by in zip(grid, shift, strict=True)]
    centres = torch.cartesian_prod(*ends).view(-1, 2, 1)  # (N, 2, 1): row, column
    angles = (2 * math.pi * centres / period).flatten(1)[:, None]  # (N, 1, d / 2)
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn the pairs of channels (j, j + d / 2) of rows x (..., T, H, d) by their angles, in fp32.

    Example: (1, 0) turned by pi / 2 is (0, 1).
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * by.cos - second * by.sin, second * by.cos + first * by.sin), dim=-1)
