"""Positions of the patches: those a network is trained with, and three ways to give a network those of another grid.

`computed` are the sine-cosine positions of the other grid's own integer coordinates. `scaled` are sine-cosine positions at
coordinates that span the image as the trained grid's do. `interpolated` are the stored positions, resized as a picture.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.errors import ConfigError

Positions = Literal["computed", "interpolated", "scaled"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)
DEFAULT_POSITIONS: Positions = "computed"  # docs/evaluation.md has the measurement


def sincos_positions(dim: int, grid: tuple[int, int], trained: tuple[int, int] | None = None) -> Tensor:
    """Return (1, N, dim) fp32: the first half of the channels encodes the column, the second the row, each sines then cosines.

    Example of dim 4: patch (row 1, column 2) is sin 2, cos 2, sin 1, cos 1.

    Args:
        trained: the grid whose coordinates those of `grid` are scaled to; default: `grid` itself.
    """
    if dim % 4:
        raise ConfigError(f"positions need a width divisible by 4, not {dim}")
    rate = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    axes = (scaled_coordinates(n, old) for n, old in zip(grid, trained or grid, strict=True))
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    angles = [axis.reshape(-1, 1) * rate for axis in (columns, rows)]  # 2 x (N, dim / 4)
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)[None].float()


def scaled_coordinates(count: int, trained: int) -> Tensor:
    """Return (count,) fp64: where the centres of `count` patches lie, in patches of a side that was cut into `trained`.

    The centre of patch i is at (i + 1/2) trained / count - 1/2: 4 patches over a side of 2 lie at -1/4, 1/4, 3/4, 5/4; 2 of
    2 at 0, 1.
    """
    places = torch.arange(count, dtype=torch.float64)
    return places if count == trained else (places + 0.5) * (trained / count) - 0.5


def interpolated_positions(stored: Tensor, trained: tuple[int, int], grid: tuple[int, int], antialias: bool = True) -> Tensor:
    """Resize stored positions (1, N, D) of the grid `trained` to (1, M, D) of `grid`, bicubically.

    Args:
        antialias: True as timm does, False as transformers does; the two differ in larger grids too.
    """
    picture = stored.float().unflatten(1, trained).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    resized = F.interpolate(picture, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    return resized.flatten(2).transpose(1, 2).to(stored.dtype)
