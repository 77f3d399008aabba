"""Context and target patches of every image: pure functions of (seed, step, slot).

A slot is an image's place in the step's global batch, whatever rank, worker or micro-batch handles it: with 2 ranks of 64
images, in micro-batches of 32, the second micro-batch of rank 1 has slots 96 to 127. Each slot owns a fixed stretch of a
counter-based random stream, so any range of slots equals the same slice of the whole. With mask.share batch, all images of
a step have the masks of slot 0.
"""

import numpy as np

from fastjepa.errors import UserError
from fastjepa.masks.layouts import CHOICE_LANE, SEEN_LANE, Masking, Slots, lay_out


def draw_masks(masking: Masking, step: int, slots: range, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the masks of b consecutive slots of a step whose global batch has `total` slots, contexts already cut.

    With `mask.truncate: batch_min` the whole groups that overlap the range are drawn, as their cut depends on all their
    images: in groups of 128, slots 96 to 160 need 0 to 255, or 0 to 199 where the batch has 200. A batch smaller than a
    group is cut as the first part of one: 64 slots need 0 to 127.

    Returns:
        The context mask (b, K, N) and the target mask (b, R, N), both bool.

    Raises:
        UserError: slots outside the batch.
        ConfigError: settings that `check_masks` refuses because no context can be large enough.
    """
    if not 0 <= slots.start <= slots.stop <= total:
        raise UserError(f"mask slots {slots.start} to {slots.stop} are not within a global batch of {total}; draw those within")
    mask = masking.mask
    group = mask.truncate_group if mask.truncate == "batch_min" else 1
    first, last = slots.start // group * group, min(-(-slots.stop // group) * group, max(total, group))
    drawn = Slots(masking.seed, step, first, last, mask.share == "batch")
    context, target = lay_out(mask, masking.grid, drawn)
    wanted = slice(slots.start - first, slots.stop - first)
    return cut_contexts(masking, context, drawn)[wanted], target[wanted]


def cut_contexts(masking: Masking, context: np.ndarray, slots: Slots) -> np.ndarray:
    """Return contexts (b, K, N) shortened as `mask.truncate` says; for batch_min, `slots` starts with a whole group.

    batch_min keeps the first patches, in raster order, of every context: as many as the shortest of its group has. In groups
    of 2, contexts of 9, 7, 8 and 12 patches (K = 1) are cut to 7, 7, 8 and 8. A patch is kept while the count of the
    context's patches up to it is at most that: of patches 1, 4, 5 and 6 a cut to 3 keeps 1, 4 and 5, whose counts are 1, 2, 3.
    """
    mask = masking.mask
    if mask.truncate == "batch_min":
        lengths = np.count_nonzero(context, axis=2).min(axis=1)  # (b,)
        starts = np.arange(0, len(lengths), mask.truncate_group)
        shortest = np.minimum.reduceat(lengths, starts).repeat(mask.truncate_group)[: len(lengths)]
        small = np.min_scalar_type(context.shape[2])  # half the time of a cut is the traffic of these counts
        return context & (np.cumsum(context, axis=2, dtype=small) <= shortest.astype(small)[:, None, None])
    if mask.truncate == "fraction":
        return _choose_patches(masking, context, slots)
    return context


def _choose_patches(masking: Masking, context: np.ndarray, slots: Slots) -> np.ndarray:
    """Return a fixed number of every context's patches at random; all of a context that has fewer."""
    _, masks, patches = context.shape
    order = np.where(context, slots.uniforms(CHOICE_LANE, masks, patches), 2.0)  # patches outside the context come last
    share = kept_patches(masking)
    chosen = np.zeros_like(context)
    np.put_along_axis(chosen, np.argpartition(order, share - 1, axis=2)[..., :share], True, axis=2)
    return chosen & context


def draw_seen(context: np.ndarray, share: float, repeats: int, slots: Slots) -> np.ndarray:
    """Draw which patches of the contexts (b, K, N) of a range of slots the predictor sees: (b, M, K, N) bool, M `repeats`.

    Each draw shows this share of each context, to the nearest patch, and one at least. Example: a context of 10 patches and
    a share of 0.25 show 2; of 3 patches 1.
    """
    b, masks, patches = context.shape
    random = slots.uniforms(SEEN_LANE, repeats * masks, patches).reshape(b, repeats, masks, patches)
    order = np.where(context[:, None], random, 2.0)  # patches outside the context come last
    kept = np.maximum(np.rint(share * np.count_nonzero(context, axis=2)), 1)  # (b, K)
    rank = order.argsort(axis=3).argsort(axis=3)
    return (rank < kept[:, None, :, None]) & context[:, None]


def kept_patches(masking: Masking) -> int:
    """Return the patches of a context that `mask.truncate: fraction` keeps."""
    rows, columns = masking.grid
    return max(1, round(masking.mask.context_fraction * (rows * columns)))
