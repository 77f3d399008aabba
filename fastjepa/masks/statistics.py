"""Statistics of the masks of a config."""

import time

import numpy as np

from fastjepa.masks.draw import cut_contexts, draw_masks
from fastjepa.masks.layouts import Masking, Slots, lay_out


def mask_statistics(masking: Masking, groups: int = 1000) -> dict[str, object]:
    """Measure what masks hold, in patches per mask, over `groups` groups of `mask.truncate_group` images, one a step.

    Keys: tokens (N), context_before and context_after (the cut), target_block, target_union (of an image), row_share
    and col_share (context patches kept by the cut / before it, per grid row and column; 0 where no context reaches),
    ms_per_2048 (median milliseconds to draw 2,048 images on this thread).
    """
    mask, grid = masking.mask, masking.grid
    before, after, target_block, target_union = np.zeros((4, grid[0] * grid[1]))  # sums over masks, per patch
    for step in range(groups):
        slots = Slots(masking.seed, step, 0, mask.truncate_group, mask.share == "batch")
        context, target = lay_out(mask, grid, slots)
        before += context.sum(axis=(0, 1))
        after += cut_contexts(masking, context, slots).sum(axis=(0, 1))
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
        "ms_per_2048": _time_draw(masking),
    }


def _kept(after: np.ndarray, before: np.ndarray) -> list[float]:
    return (after / np.maximum(before, 1)).tolist()


def _time_draw(masking: Masking, images: int = 2048, repeats: int = 21) -> float:
    """Return the median milliseconds of one draw, each of another step."""
    seconds = []
    for step in range(repeats):
        start = time.perf_counter()
        draw_masks(masking, step, range(images), images)
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds))
