"""Context and target patches of every image: pure functions of (seed, step, slot).

A slot is an image's place in the step's global batch, whatever rank, worker or micro-batch handles it. Each slot
owns a fixed stretch of a counter-based random stream, so any range of slots equals the same slice of the whole.
A mask is a row of N = rows * cols booleans, patches in raster order. With mask.share batch, all images of a step have
the masks of slot 0.
"""

import numpy as np

from fastjepa.config.schema import MaskConfig
from fastjepa.errors import ConfigError
from fastjepa.masks.layouts import CHOICE_LANE, Grid, Slots, lay_out


def draw_masks(
    mask: MaskConfig, grid: Grid, seed: int, step: int, start: int, stop: int, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """The masks of slots `start` to `stop` of a step whose global batch has `total` slots, contexts already cut.

    Returns (context_mask (stop - start, K, N), target_mask (stop - start, R, N)), both bool. With `batch_min` the whole
    groups that overlap the range are drawn, as their cut depends on all their images; a batch smaller than a group is cut
    as the first part of one. ConfigError for a range outside the batch, and for settings that `check` refuses because no
    context can be large enough.
    """
    if not 0 <= start <= stop <= total:
        raise ConfigError(
            f"mask slots {start} to {stop} are not within a global batch of {total}; pass 0 <= start <= stop <= total"
        )
    group = mask.truncate_group if mask.truncate == "batch_min" else 1
    first, last = start // group * group, min(-(-stop // group) * group, max(total, group))
    slots = Slots(seed, step, first, last, mask.share == "batch")
    context, target = lay_out(mask, grid, slots)
    wanted = slice(start - first, stop - first)
    return cut_contexts(mask, context, slots)[wanted], target[wanted]


def cut_contexts(mask: MaskConfig, context: np.ndarray, slots: Slots) -> np.ndarray:
    """Contexts (b, K, N) shortened as `mask.truncate` says; for batch_min, `slots` starts with a whole group."""
    if mask.truncate == "batch_min":
        lengths = np.count_nonzero(context, axis=2).min(axis=1)  # (b,)
        starts = np.arange(0, len(lengths), mask.truncate_group)
        shortest = np.minimum.reduceat(lengths, starts).repeat(mask.truncate_group)[: len(lengths)]
        small = np.min_scalar_type(context.shape[2])  # half the time of a cut is the traffic of these counts
        return context & (np.cumsum(context, axis=2, dtype=small) <= shortest.astype(small)[:, None, None])
    if mask.truncate == "fraction":
        return _choose_patches(mask, context, slots)
    return context


def _choose_patches(mask: MaskConfig, context: np.ndarray, slots: Slots) -> np.ndarray:
    """A fixed number of every context's patches at random; all of a context that has fewer."""
    _, masks, patches = context.shape
    order = np.where(context, slots.uniforms(CHOICE_LANE, masks, patches), 2.0)  # patches outside the context come last
    share = kept_patches(mask, patches)
    chosen = np.zeros_like(context)
    np.put_along_axis(chosen, np.argpartition(order, share - 1, axis=2)[..., :share], True, axis=2)
    return chosen & context


def kept_patches(mask: MaskConfig, patches: int) -> int:
    return max(1, round(mask.context_fraction * patches))
