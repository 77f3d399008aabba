"""Context and target patches of every image: pure functions of (seed, step, slot).

A slot is an image's place in the step's global batch, whatever rank, worker or micro-batch handles it. Each slot
owns a fixed stretch of a counter-based random stream, so any range of slots equals the same slice of the whole.
A mask is a row of N = rows * cols booleans, patches in raster order. Multi-block masks are those of I-JEPA
(Assran et al., 2023): R target blocks, and K context blocks from which the image's own targets are removed.
"""

import time
import warnings
from dataclasses import dataclass

import numpy as np

from fastjepa.config import Config, ConfigError, MaskConfig
from fastjepa.draws import MASKS, generator

Grid = tuple[int, int]  # (rows, columns) of patches
Ranges = tuple[tuple[float, float], tuple[float, float]]  # (scale, aspect) of a block

# Lanes of a step's random stream, 2**64 blocks apart; contexts use one lane an attempt from CONTEXTS on.
SIZES, TARGETS, CHOICE, CONTEXTS = range(4)
TRIES = 20  # context blocks tried before one more target block is no longer excluded (official)
HIDDEN, GAP = 200, 4  # picture: grey level of a hidden patch, white pixels between images


@dataclass(frozen=True)
class Slots:
    """Slots start to stop of one step's global batch."""

    seed: int
    step: int
    start: int
    stop: int

    def uniforms(self, lane: int, masks: int, count: int) -> np.ndarray:
        """Doubles in [0, 1), shape (slots, masks, count); a slot owns whole blocks of four, so that it can be drawn alone."""
        blocks = -(-masks * count // 4)
        random = generator(self.seed, MASKS, self.step, (lane << 64) + self.start * blocks)
        drawn = random.random((self.stop - self.start, 4 * blocks))
        return drawn[:, : masks * count].reshape(-1, masks, count)


def draw(
    mask: MaskConfig, grid: Grid, seed: int, step: int, start: int, stop: int, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """The masks of slots `start` to `stop` of a step whose global batch has `total` slots, contexts already cut.

    Returns (context_mask (stop - start, K, N), target_mask (stop - start, R, N)), both bool. With `batch_min` the whole
    groups that overlap the range are drawn, as their cut depends on all their images. ConfigError for a range outside
    the batch, and for settings that `check` refuses because no context can be large enough.
    """
    if not 0 <= start <= stop <= total:
        raise ConfigError(
            f"mask slots {start} to {stop} are not within a global batch of {total}; pass 0 <= start <= stop <= total"
        )
    group = mask.truncate_group if mask.truncate == "batch_min" else 1
    first, last = start // group * group, min(-(-stop // group) * group, total)
    slots = Slots(seed, step, first, last)
    context, target = _multiblock(mask, grid, slots)
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
    target = _smallest(mask, grid, _target_ranges(mask))
    for key, area in (("pred_mask_scale", target), ("enc_mask_scale", _smallest(mask, grid, _context_ranges(mask)))):
        if area <= mask.min_keep:
            raise ConfigError(
                f"mask.{key}: a block on the {rows}x{cols} grid can be as small as {area} patches, which {enough}; "
                "raise the scale, lower mask.min_keep or use smaller patches"
            )
    height, width = _reach(mask, grid)
    if not mask.allow_overlap and height * width - target <= mask.min_keep:
        raise ConfigError(
            f"mask.pred_mask_scale: a target leaves the context at most {height * width - target} patches of the {rows}x{cols} "
            f"grid, which {enough}; lower the scale or mask.min_keep, or set mask.allow_overlap: true"
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
        slots = Slots(seed, step, 0, mask.truncate_group)
        context, target = _multiblock(mask, grid, slots)
        before += context.sum(axis=(0, 1))
        after += _cut(mask, context, slots).sum(axis=(0, 1))
        target_block += target.sum(axis=(0, 1))
        target_union += target.any(axis=1).sum(axis=0)
    images = groups * mask.truncate_group
    return {
        "tokens": before.size,
        "context_before": float(before.sum() / (images * mask.num_enc_masks)),
        "context_after": float(after.sum() / (images * mask.num_enc_masks)),
        "target_block": float(target_block.sum() / (images * mask.num_pred_masks)),
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


def _multiblock(mask: MaskConfig, grid: Grid, slots: Slots) -> tuple[np.ndarray, np.ndarray]:
    """Uncut masks of a range of slots: context (b, K, N) and target (b, R, N)."""
    target_size, context_size = generator(slots.seed, MASKS, slots.step, SIZES).random(2)
    uniforms = slots.uniforms(TARGETS, mask.num_pred_masks, 4)
    target = _blocks(mask, grid, _target_ranges(mask), target_size, uniforms)
    return _contexts(mask, grid, slots, context_size, target), target


def _contexts(mask: MaskConfig, grid: Grid, slots: Slots, size: float, target: np.ndarray) -> np.ndarray:
    """(b, K, N): context blocks minus targets, each redrawn while it is too small.

    Every TRIES failures the last target block still excluded is let go (official), so the last attempt excludes none
    and cannot fail unless `check` refuses the settings.
    """
    excluding = 0 if mask.allow_overlap else target.shape[1]
    context = np.empty((target.shape[0], mask.num_enc_masks, target.shape[2]), bool)
    image, k = np.nonzero(np.ones(context.shape[:2], bool))  # the masks still to be drawn
    for attempt in range(TRIES * excluding + 1):
        if attempt % TRIES == 0:
            free = ~target[:, : excluding - attempt // TRIES].any(axis=1)  # (b, N)
        uniforms = slots.uniforms(CONTEXTS + attempt, mask.num_enc_masks, 4)[image, k]
        block = _blocks(mask, grid, _context_ranges(mask), size, uniforms) & free[image]
        fits = np.count_nonzero(block, axis=1) > mask.min_keep
        context[image[fits], k[fits]] = block[fits]
        image, k = image[~fits], k[~fits]
        if not image.size:
            return context
    raise ConfigError(f"mask.enc_mask_scale: no context block holds more than mask.min_keep: {mask.min_keep}; raise the scale")


def _target_ranges(mask: MaskConfig) -> Ranges:
    return mask.pred_mask_scale, mask.aspect_ratio


def _context_ranges(mask: MaskConfig) -> Ranges:
    return mask.enc_mask_scale, (1.0, 1.0)


def _reach(mask: MaskConfig, grid: Grid) -> Grid:
    """Rows and columns that blocks can touch: official sampling never reaches the last of either."""
    edge = mask.sampling == "official"
    return grid[0] - edge, grid[1] - edge


def _blocks(mask: MaskConfig, grid: Grid, ranges: Ranges, shared: float, uniforms: np.ndarray) -> np.ndarray:
    """Blocks (..., N) from uniforms (..., 4): scale, aspect, top, left.

    Official sampling has one number for both scale and aspect of all blocks of a step: `shared`.
    """
    height, width = _reach(mask, grid)
    scale, aspect, down, right = np.moveaxis(uniforms, -1, 0)
    if mask.sampling == "official":
        scale = aspect = shared
    h, w = _size(mask, grid, ranges, scale, aspect)
    in_rows = _interval(np.floor(down * (height - h + 1)), h, grid[0])
    in_cols = _interval(np.floor(right * (width - w + 1)), w, grid[1])
    return (in_rows[..., :, None] & in_cols[..., None, :]).reshape(*down.shape, grid[0] * grid[1])


def _interval(start: np.ndarray, length: np.ndarray, side: int) -> np.ndarray:
    """(..., side) bool: true at the `length` places from `start` on."""
    place = np.arange(side)
    return (place >= start[..., None]) & (place < (start + length)[..., None])


def _size(mask: MaskConfig, grid: Grid, ranges: Ranges, scale_draw, aspect_draw) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths in patches for draws in [0, 1) over the ranges of scale and aspect (height / width)."""
    (scale, scale_end), (aspect, aspect_end) = ranges
    height, width = _reach(mask, grid)
    area = np.floor(grid[0] * grid[1] * (scale + scale_draw * (scale_end - scale)))
    aspect = aspect + aspect_draw * (aspect_end - aspect)
    return np.minimum(np.rint(np.sqrt(area * aspect)), height), np.minimum(np.rint(np.sqrt(area / aspect)), width)


def _smallest(mask: MaskConfig, grid: Grid, ranges: Ranges) -> int:
    """Area of the smallest block that can be drawn.

    Area is a step function of the draw: it is tried at and between all places where a rounding can tip over. With
    independent draws the smallest scale is the worst for every aspect; official sampling ties the two together.
    """
    (scale, scale_end), (aspect, aspect_end) = ranges
    patches, half = grid[0] * grid[1], np.arange(max(grid)) + 0.5
    areas = np.arange(max(1, int(patches * scale)), int(patches * scale_end) + 2)[:, None]
    tips = [((areas / patches - scale) / (scale_end - scale or 1)).ravel()]
    tips += [((tip - aspect) / (aspect_end - aspect or 1)).ravel() for tip in (half**2 / areas, areas / half**2)]
    tips = np.unique(np.clip(np.concatenate([[0.0, 1.0], *tips]), 0.0, np.nextafter(1.0, 0.0)))
    draws = np.concatenate([tips, (tips[1:] + tips[:-1]) / 2])
    h, w = _size(mask, grid, ranges, draws if mask.sampling == "official" else 0.0, draws)
    return int((h * w).min())


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
    short = total % mask.truncate_group
    if mask.truncate == "batch_min" and short:
        warnings.warn(
            f"mask.truncate_group: the last group of a step holds {short} images instead of {mask.truncate_group} and is cut "
            f"less; make data.batch_size * ranks (now {total}) a multiple of it",
            stacklevel=3,
        )
    drawn = [_multiblock(mask, grid, Slots(config.runtime.seed, step, 0, 64)) for step in range(16)]
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
