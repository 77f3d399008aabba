"""Statistics of masks, and a picture of them."""

import time

import numpy as np

from fastjepa.config.schema import MaskConfig
from fastjepa.errors import UserError
from fastjepa.masks.draw import cut_contexts, draw_masks
from fastjepa.masks.layouts import Grid, Slots, lay_out

HIDDEN_GREY, GAP_PIXELS = 200, 4  # picture: grey level of a hidden patch, white pixels between images


def mask_statistics(mask: MaskConfig, grid: Grid, seed: int, groups: int = 1000) -> dict[str, object]:
    """Measure what masks hold, in patches per mask, over `groups` groups of `mask.truncate_group` images, one a step.

    Keys: tokens (N), context_before and context_after (the cut), target_block, target_union (of an image), row_share
    and col_share (context patches kept by the cut / before it, per grid row and column; 0 where no context reaches),
    ms_per_2048 (median milliseconds to draw 2,048 images on this thread).
    """
    before, after, target_block, target_union = np.zeros((4, grid[0] * grid[1]))  # sums over masks, per patch
    for step in range(groups):
        slots = Slots(seed, step, 0, mask.truncate_group, mask.share == "batch")
        context, target = lay_out(mask, grid, slots)
        before += context.sum(axis=(0, 1))
        after += cut_contexts(mask, context, slots).sum(axis=(0, 1))
        target_block += target.sum(axis=(0, 1))
        target_union += target.any(axis=1).sum(axis=0)
    images = groups * mask.truncate_group
    return {
        "tokens": before.size,
        "context_before": float(before.sum() / (images * mask.num_enc_masks)),
        "context_after": float(after.sum() / (images * mask.num_enc_masks)),
        "target_block": float(target_block.sum() / (images * mask.target_blocks)),
        "target_union": float(target_union.sum() / images),
        "row_share": _kept(after.reshape(grid).sum(axis=1), before.reshape(grid).sum(axis=1)),
        "col_share": _kept(after.reshape(grid).sum(axis=0), before.reshape(grid).sum(axis=0)),
        "ms_per_2048": _time_draw(mask, grid, seed),
    }


def masks_picture(images: np.ndarray, context_mask: np.ndarray, target_mask: np.ndarray, patch_size: int) -> np.ndarray:
    """Draw a sheet with one row an image: the image, its contexts, its targets; hidden patches are grey.

    Args:
        images: (b, H, W, 3) uint8.
        context_mask: (b, K, N) bool, as `draw_masks` returns it.
        target_mask: (b, R, N) bool.
        patch_size: side of a patch in pixels.

    Returns:
        uint8 pixels for Pillow's `Image.fromarray`, with white gaps of GAP_PIXELS: 3 images of 32 x 32 pixels with one context
        and 4 targets are 3 * 36 - 4 = 104 pixels high and 6 * 36 - 4 = 212 wide, shape (104, 212, 3).

    Raises:
        UserError: the patches do not tile the images.
    """
    b, height, width, _ = images.shape
    rows, cols = height // patch_size, width // patch_size
    if (rows * patch_size, cols * patch_size, rows * cols) != (height, width, context_mask.shape[-1]):
        raise UserError(
            f"masks of {context_mask.shape[-1]} patches do not fit images of {height}x{width} pixels at mask.patch_size: "
            f"{patch_size}; draw them for the grid of these images"
        )
    visible = np.concatenate([np.ones_like(context_mask[:, :1]), context_mask, target_mask], axis=1)  # (b, 1 + K + R, N)
    visible = visible.reshape(b, -1, rows, cols).repeat(patch_size, axis=2).repeat(patch_size, axis=3)
    tiles = np.where(visible[..., None], images[:, None], np.uint8(HIDDEN_GREY))  # (b, 1 + K + R, H, W, 3)
    tiles = np.pad(tiles, ((0, 0), (0, 0), (0, GAP_PIXELS), (0, GAP_PIXELS), (0, 0)), constant_values=255)
    sheet = tiles.transpose(0, 2, 1, 3, 4).reshape(b * (height + GAP_PIXELS), -1, 3)
    return sheet[:-GAP_PIXELS, :-GAP_PIXELS]


def _kept(after: np.ndarray, before: np.ndarray) -> list[float]:
    return (after / np.maximum(before, 1)).tolist()


def _time_draw(mask: MaskConfig, grid: Grid, seed: int, images: int = 2048, repeats: int = 21) -> float:
    """Return the median milliseconds of one draw, each of another step."""
    seconds = []
    for step in range(repeats):
        start = time.perf_counter()
        draw_masks(mask, grid, seed, step, range(images), images)
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds))
