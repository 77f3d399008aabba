"""Principal components of patch features as colours, and tensors of images as arrays."""

import numpy as np
import torch
from torch import Tensor

from fastjepa.errors import UserError
from fastjepa.visualize.images import HIDDEN_COLOUR, enlarged

CLIPPED_SHARE = 0.01  # share of patches beyond either end of a component's colours


def to_uint8(images: Tensor) -> np.ndarray:
    """Turn (b, C, H, W) of 1 or 3 channels into (b, H, W, 3): uint8 as it is, floats from [0, 1], clipped."""
    if images.dtype != torch.uint8:
        images = (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
    return images.cpu().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()


def principal_components(x: Tensor, count: int = 3) -> Tensor:
    """Return (n, count) fp64: the coordinates of the rows of (n, D) along the axes of largest variance, the largest first.

    An axis points to where its entry of largest magnitude is positive, as scikit-learn's does: the same input gives the
    same signs. Where D is less than `count`, the columns beyond it are zero.
    """
    x = x.double().cpu()
    x = x - x.mean(dim=0)
    _, axes = torch.linalg.eigh(x.T @ x)  # columns, by rising variance
    axes = axes.flip(1)[:, :count]
    signs = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    found = x @ (axes * signs)
    return torch.nn.functional.pad(found, (0, count - found.shape[1]))


def pca_picture(
    features: Tensor, grid: tuple[int, int], size: tuple[int, int], mask: Tensor | np.ndarray | None = None
) -> np.ndarray:
    """Return the first three principal components of patch features as red, green and blue.

    Args:
        features: (b, N, D), any float dtype; the components are those of all patches of all images together.
        grid: (rows, columns), N of them; UserError where they are not.
        size: (H, W) of the pictures; patches are enlarged as squares, not blended.
        mask: (b, N) bool, the patches that count; the others are grey. Default: all.

    Returns:
        (b, H, W, 3) uint8. Each component is stretched between its 1st and 99th percentile; one that does not vary is
        mid grey. Colours of two calls mean different things.
    """
    b, n, _ = features.shape
    if grid[0] * grid[1] != n:
        raise UserError(f"features of {n} patches do not fill a grid of {grid[0]}x{grid[1]}; give the grid they were made on")
    shown = torch.ones(b, n, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    colours = torch.full((b, n, 3), HIDDEN_COLOUR, dtype=torch.uint8)
    if shown.any():
        colours[shown] = _stretched(principal_components(features.cpu()[shown]))
    return enlarged(colours.view(b, *grid, 3).numpy(), size)


def _stretched(values: Tensor) -> Tensor:
    """Bring each column of (n, 3) to 0 ... 255 uint8, between its own percentiles."""
    low, high = torch.quantile(values, torch.tensor([CLIPPED_SHARE, 1 - CLIPPED_SHARE], dtype=values.dtype), dim=0)
    span = high - low
    flat = span <= 1e-9 * span.max()
    share = torch.where(flat, 0.5, (values - low) / torch.where(flat, 1.0, span))
    return (share.clamp(0, 1) * 255).round().to(torch.uint8)
