"""Context and target patches of every image: pure functions of (seed, step, slot).

A slot is an image's place in the step's global batch, whatever rank, worker or micro-batch handles it. Each slot
owns a fixed stretch of a counter-based random stream, so any range of slots equals the same slice of the whole.
A mask is a row of N = rows * cols booleans, patches in raster order. With mask.share batch, all images of a step have
the masks of slot 0.
"""

import time
import warnings

import numpy as np

from fastjepa import strategies
from fastjepa.config import Config, ConfigError, MaskConfig
from fastjepa.strategies import CHOICE, Grid, Slots

HIDDEN, GAP = 200, 4  # picture: grey level of a hidden patch, white pixels between images


def draw(
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
    context, target = strategies.lay_out(mask, grid, slots)
    wanted = slice(start - first, stop - first)
    return _cut(mask, context, slots)[wanted], target[wanted]


def check(config: Config, total: int) -> None:
    """Refuse masks that cannot be drawn, and warn of those that do not mean what they say; `total` slots a step.

    ConfigError: a block may be too small for `min_keep`, or no context can be free of its targets. Warnings: a short
    last group (its contexts are cut less), and contexts that often keep target patches for want of room.
    """
    mask, grid = config.mask, config.grid
    rows, cols = grid
    enough = f"must be more than mask.min_keep: {mask.min_keep}"
    if mask.strategy == "multiblock":
        _check_blocks(mask, grid, enough)
    elif (fewest := min(strategies.smallest(mask, grid))) <= mask.min_keep:
        raise ConfigError(
            f"mask.strategy: {mask.strategy} masks on the {rows}x{cols} grid hold as few as {fewest} patches, which {enough}; "
            "lower mask.min_keep or use smaller patches"
        )
    if mask.truncate == "fraction" and _share(mask, rows * cols) <= mask.min_keep:
        raise ConfigError(
            f"mask.context_fraction: {mask.context_fraction} of the {rows}x{cols} grid is {_share(mask, rows * cols)} "
            f"patches, which {enough}; raise the fraction or lower mask.min_keep"
        )
    _warn(config, total)


def statistics(config: Config, groups: int = 1000) -> dict[str, object]:
    """What the masks of a config hold, in patches per mask, over `groups` groups of `truncate_group` images, one a step.

    Keys: tokens (N), context_before and context_after (the cut), target_block, target_union (of an image), row_share
    and col_share (context patches kept by the cut / before it, per grid row and column; 0 where no context reaches),
    ms_per_2048 (median milliseconds to draw 2,048 images on this thread).
    """
    mask, grid, seed = config.mask, config.grid, config.runtime.seed
    before, after, target_block, target_union = np.zeros((4, grid[0] * grid[1]))  # sums over masks, per patch
    for step in range(groups):
        slots = Slots(seed, step, 0, mask.truncate_group, mask.share == "batch")
        context, target = strategies.lay_out(mask, grid, slots)
        before += context.sum(axis=(0, 1))
        after += _cut(mask, context, slots).sum(axis=(0, 1))
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
        "ms_per_2048": _time(mask, grid, seed),
    }


def picture(images: np.ndarray, context_mask: np.ndarray, target_mask: np.ndarray, patch_size: int) -> np.ndarray:
    """A sheet with one row an image: the image, its contexts, its targets; hidden patches are grey.

    Args:
        images: (b, H, W, 3) uint8.
        context_mask: (b, K, N) bool, as `draw` returns it.
        target_mask: (b, R, N) bool.
        patch_size: side of a patch in pixels; ConfigError when the patches do not tile the images.

    Returns:
        (b * (H + GAP) - GAP, (1 + K + R) * (W + GAP) - GAP, 3) uint8, ready for Pillow's `Image.fromarray`.
    """
    b, height, width, _ = images.shape
    rows, cols = height // patch_size, width // patch_size
    if (rows * patch_size, cols * patch_size, rows * cols) != (height, width, context_mask.shape[-1]):
        raise ConfigError(
            f"masks of {context_mask.shape[-1]} patches do not fit images of {height}x{width} pixels at mask.patch_size: "
            f"{patch_size}; draw them for the grid of these images"
        )
    visible = np.concatenate([np.ones_like(context_mask[:, :1]), context_mask, target_mask], axis=1)  # (b, 1 + K + R, N)
    visible = visible.reshape(b, -1, rows, cols).repeat(patch_size, axis=2).repeat(patch_size, axis=3)
    tiles = np.where(visible[..., None], images[:, None], np.uint8(HIDDEN))  # (b, 1 + K + R, H, W, 3)
    tiles = np.pad(tiles, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    sheet = tiles.transpose(0, 2, 1, 3, 4).reshape(b * (height + GAP), -1, 3)
    return sheet[:-GAP, :-GAP]


def _check_blocks(mask: MaskConfig, grid: Grid, enough: str) -> None:
    """ConfigError where a block of a multi-block mask, or the context that one leaves, may be too small."""
    rows, cols = grid
    target, context = (strategies.smallest_block(mask, grid, find(mask)) for find in
                       (strategies.target_ranges, strategies.context_ranges))  # fmt: skip
    for key, area in (("pred_mask_scale", target), ("enc_mask_scale", context)):
        if area <= mask.min_keep:
            raise ConfigError(
                f"mask.{key}: a block on the {rows}x{cols} grid can be as small as {area} patches, which {enough}; "
                "raise the scale, lower mask.min_keep or use smaller patches"
            )
    height, width = strategies.reach(mask, grid)
    if not mask.allow_overlap and height * width - target <= mask.min_keep:
        raise ConfigError(
            f"mask.pred_mask_scale: a target leaves the context at most {height * width - target} patches of the {rows}x{cols} "
            f"grid, which {enough}; lower the scale or mask.min_keep, or set mask.allow_overlap: true"
        )


def _cut(mask: MaskConfig, context: np.ndarray, slots: Slots) -> np.ndarray:
    """Contexts (b, K, N) shortened as `mask.truncate` says; for batch_min, `slots` starts with a whole group."""
    if mask.truncate == "batch_min":
        lengths = np.count_nonzero(context, axis=2).min(axis=1)  # (b,)
        starts = np.arange(0, len(lengths), mask.truncate_group)
        shortest = np.minimum.reduceat(lengths, starts).repeat(mask.truncate_group)[: len(lengths)]
        small = np.min_scalar_type(context.shape[2])  # half the time of a cut is the traffic of these counts
        return context & (np.cumsum(context, axis=2, dtype=small) <= shortest.astype(small)[:, None, None])
    if mask.truncate == "fraction":
        return _choose(mask, context, slots)
    return context


def _choose(mask: MaskConfig, context: np.ndarray, slots: Slots) -> np.ndarray:
    """A fixed number of every context's patches at random; all of a context that has fewer."""
    _, masks, patches = context.shape
    order = np.where(context, slots.uniforms(CHOICE, masks, patches), 2.0)  # patches outside the context come last
    share = _share(mask, patches)
    chosen = np.zeros_like(context)
    np.put_along_axis(chosen, np.argpartition(order, share - 1, axis=2)[..., :share], True, axis=2)
    return chosen & context


def _share(mask: MaskConfig, patches: int) -> int:
    return max(1, round(mask.context_fraction * patches))


def _warn(config: Config, total: int) -> None:
    mask, grid = config.mask, config.grid
    short = total % mask.truncate_group if total > mask.truncate_group else 0
    if mask.truncate == "batch_min" and mask.share == "image" and short:
        warnings.warn(
            f"mask.truncate_group: the last group of a step holds {short} images instead of {mask.truncate_group} and is cut "
            f"less; make data.batch_size * ranks (now {total}) a multiple of it",
            stacklevel=3,
        )
    drawn = [strategies.lay_out(mask, grid, Slots(config.runtime.seed, step, 0, 64)) for step in range(16)]
    overlap = np.mean([(context & target.any(axis=1)[:, None]).any(axis=2) for context, target in drawn])
    if not mask.allow_overlap and overlap > 0.01:
        warnings.warn(
            f"mask.min_keep: {overlap:.0%} of contexts contain target patches, as the {grid[0]}x{grid[1]} grid rarely has more "
            f"than {mask.min_keep} beside the targets; lower mask.min_keep or mask.pred_mask_scale",
            stacklevel=3,
        )


def _kept(after: np.ndarray, before: np.ndarray) -> list[float]:
    return (after / np.maximum(before, 1)).tolist()


def _time(mask: MaskConfig, grid: Grid, seed: int, images: int = 2048, repeats: int = 21) -> float:
    """Median milliseconds of one draw, each of another step."""
    seconds = []
    for step in range(repeats):
        start = time.perf_counter()
        draw(mask, grid, seed, step, 0, images, images)
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds))
