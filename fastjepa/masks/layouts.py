"""Layouts of target blocks and contexts on an image's patches, as `mask.strategy` says, before any cut.

Multi-block masks are those of I-JEPA (Assran et al., 2023): R target blocks, and K context blocks from which the image's
own targets are removed. The other strategies are those of its ablation (table 6): one context, all that is no target.

A mask is a row of N = rows * columns booleans, patches in raster order: on a grid of 3 x 4, patch 6 is row 1, column 2.
"""

import math
from dataclasses import dataclass

import numpy as np

from fastjepa.config.schema import Config, MaskConfig
from fastjepa.errors import ConfigError
from fastjepa.masks.packings import PER_BLOCK, ContextUse, PerBlockPacking, packing_of
from fastjepa.rng import MASK_STREAM, generator

Grid = tuple[int, int]  # (rows, columns) of patches
Ranges = tuple[tuple[float, float], tuple[float, float]]  # (scale, aspect) of a block

# Lanes of a step's random stream, 2**64 blocks of four numbers apart, so that no draw reaches into the next lane: lane 0
# has the sizes that a step's blocks share, 1 the target blocks, 2 the choice of patches (mask.truncate fraction), and
# 3, 4, 5, ... the first, second, third, ... attempt at the contexts.
SIZE_LANE, TARGET_LANE, CHOICE_LANE, CONTEXT_LANE = range(4)
SEEN_LANE = 1 << 32  # the patches of a context that the predictor sees: past every attempt
CONTEXT_TRIES = 20  # context blocks tried before one more target block is no longer excluded (official)


@dataclass(frozen=True)
class Masking:
    """Masking of a run: how masks are laid out on an image's patches, from which seed they are drawn, how they are packed."""

    mask: MaskConfig
    grid: Grid
    seed: int = 0
    packing: PerBlockPacking = PER_BLOCK
    use: ContextUse = ContextUse()

    @classmethod
    def of(cls, config: Config) -> "Masking":
        """Return the masking that a config asks for."""
        meta, loss = config.meta, config.loss
        use = ContextUse(meta.predictor_context, meta.predictor_repeats, loss.visible_weight, loss.visible_rise)
        return cls(config.mask, config.grid, config.runtime.seed, packing_of(meta.predictor, loss.target), use)


@dataclass(frozen=True)
class Slots:
    """A range of slots of one step's global batch, and the random numbers that belong to each."""

    seed: int
    step: int
    start: int
    stop: int
    shared: bool = False  # whether all of them draw what slot 0 draws

    def uniforms(self, lane: int, masks: int, count: int) -> np.ndarray:
        """Return doubles in [0, 1), shape (slots, masks, count).

        The generator counts in blocks of four numbers, and a slot owns whole blocks, so that it can be drawn alone. With 2
        masks of 5 numbers a slot needs 10 and owns 3 blocks: slot 0 has numbers 0 to 9 of the lane, slot 1 has 12 to 21
        (10, 11 and 22, 23 are not used), and a range that starts with slot 7 begins at block 21 of the lane.
        """
        blocks = -(-masks * count // 4)
        start, stop = (0, 1) if self.shared else (self.start, self.stop)
        random = generator(self.seed, MASK_STREAM, self.step, (lane << 64) + start * blocks)
        drawn = random.random((stop - start, 4 * blocks))[:, : masks * count].reshape(-1, masks, count)
        return np.broadcast_to(drawn, (self.stop - self.start, masks, count)) if self.shared else drawn


def lay_out(mask: MaskConfig, grid: Grid, slots: Slots) -> tuple[np.ndarray, np.ndarray]:
    """Return the uncut masks of a range of slots: context (b, K, N) and target (b, R, N), both bool."""
    if mask.strategy == "multiblock":
        return _multiblock(mask, grid, slots)
    target = {"block": _single_block, "rasterized": _three_quadrants, "random": _random_patches}[mask.strategy](
        mask, grid, slots
    )
    return ~target.any(axis=1, keepdims=True), target


def fewest_patches(mask: MaskConfig, grid: Grid) -> tuple[int, int]:
    """Return the fewest patches of a context and of a target block; not for multi-block masks, see `smallest_block`."""
    patches = grid[0] * grid[1]
    if mask.strategy == "rasterized":
        quadrant = (grid[0] // 2) * (grid[1] // 2)
        return quadrant, quadrant
    if mask.strategy == "random":
        hidden = round(mask.hidden_share * patches)
        return patches - hidden, hidden
    heights = np.arange(*_block_heights(mask, grid, np.array([0.0, 1.0])) + (0, 1))
    areas = heights * _block_width(mask, grid, heights)
    return int(patches - areas.max()), int(areas.min())


def _single_block(mask: MaskConfig, grid: Grid, slots: Slots) -> np.ndarray:
    """Return (b, 1, N): one rectangle of mask.hidden_share of the grid, to the nearest whole column, in any place and shape."""
    aspect, down, right = np.moveaxis(slots.uniforms(TARGET_LANE, 1, 3), -1, 0)  # (b, 1)
    h = _block_heights(mask, grid, aspect)
    return _placed(grid, h, _block_width(mask, grid, h), down, right, grid)


def _block_heights(mask: MaskConfig, grid: Grid, draw: np.ndarray) -> np.ndarray:
    """Return the single block's heights for draws in [0, 1) over mask.aspect_ratio, such that no width passes the grid's.

    On a grid of 10 x 10 a block of .6 has 60 patches: aspect ratio 1 gives round(sqrt(60)) = 8 rows and round(60 / 8) = 8
    columns; a height below ceil(60 / 10) = 6 would need more columns than there are.
    """
    (rows, cols), (aspect, aspect_end) = grid, mask.aspect_ratio
    area = mask.hidden_share * rows * cols
    return np.clip(np.rint(np.sqrt(area * (aspect + draw * (aspect_end - aspect)))), math.ceil(area / cols), rows)


def _block_width(mask: MaskConfig, grid: Grid, heights: np.ndarray) -> np.ndarray:
    return np.rint(mask.hidden_share * grid[0] * grid[1] / heights)


def _three_quadrants(mask: MaskConfig, grid: Grid, slots: Slots) -> np.ndarray:
    """Return (b, 3, N): a target block for each quadrant of the grid but one, which is drawn and becomes the context.

    Quadrants are 0 top left, 1 top right, 2 bottom left, 3 bottom right. Where 2 is kept, the targets are 3, 0 and 1.
    """
    rows, cols = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    quadrant = 2 * (rows >= grid[0] // 2) + (cols >= grid[1] // 2)  # (N,) 0 to 3
    kept = np.floor(4 * slots.uniforms(TARGET_LANE, 1, 1))  # (b, 1, 1)
    return quadrant == (kept + [[1], [2], [3]]) % 4


def _random_patches(mask: MaskConfig, grid: Grid, slots: Slots) -> np.ndarray:
    """Return (b, 1, N): mask.hidden_share of the patches at random, as one target block."""
    order = slots.uniforms(TARGET_LANE, 1, grid[0] * grid[1])
    target = np.zeros(order.shape, bool)
    count = round(mask.hidden_share * target.shape[2])
    np.put_along_axis(target, np.argpartition(order, count - 1, axis=2)[..., :count], True, axis=2)
    return target


def _multiblock(mask: MaskConfig, grid: Grid, slots: Slots) -> tuple[np.ndarray, np.ndarray]:
    """Return the uncut multi-block masks of a range of slots: context (b, K, N) and target (b, R, N)."""
    target_size, context_size = generator(slots.seed, MASK_STREAM, slots.step, SIZE_LANE).random(2)
    uniforms = slots.uniforms(TARGET_LANE, mask.num_pred_masks, 4)
    target = _blocks_of(mask, grid, target_ranges(mask), target_size, uniforms)
    return _contexts(mask, grid, slots, context_size, target), target


def _contexts(mask: MaskConfig, grid: Grid, slots: Slots, size: float, target: np.ndarray) -> np.ndarray:
    """Return (b, K, N): context blocks minus targets, each redrawn while it is too small.

    After every CONTEXT_TRIES failures one target block fewer is excluded, the last one first (official). With 4 target
    blocks attempts 0 to 19 exclude all four, 20 to 39 the first three, 60 to 79 the first alone, and attempt 80 none, which
    cannot fail unless `check_masks` refuses the settings.
    """
    excluding = 0 if mask.allow_overlap else target.shape[1]
    context = np.empty((target.shape[0], mask.num_enc_masks, target.shape[2]), bool)
    image, k = np.nonzero(np.ones(context.shape[:2], bool))  # the masks still to be drawn
    for attempt in range(CONTEXT_TRIES * excluding + 1):
        if attempt % CONTEXT_TRIES == 0:
            free = ~target[:, : excluding - attempt // CONTEXT_TRIES].any(axis=1)  # (b, N)
        uniforms = slots.uniforms(CONTEXT_LANE + attempt, mask.num_enc_masks, 4)[image, k]
        block = _blocks_of(mask, grid, context_ranges(mask), size, uniforms) & free[image]
        fits = np.count_nonzero(block, axis=1) > mask.min_keep
        context[image[fits], k[fits]] = block[fits]
        image, k = image[~fits], k[~fits]
        if not image.size:
            return context
    raise ConfigError(f"mask.enc_mask_scale: no context block holds more than mask.min_keep: {mask.min_keep}; raise the scale")


def target_ranges(mask: MaskConfig) -> Ranges:
    """Return the ranges of scale and aspect ratio that target blocks are drawn from."""
    return mask.pred_mask_scale, mask.aspect_ratio


def context_ranges(mask: MaskConfig) -> Ranges:
    """Return the ranges of scale and aspect ratio that context blocks are drawn from: they are square."""
    return mask.enc_mask_scale, (1.0, 1.0)


def reachable_grid(mask: MaskConfig, grid: Grid) -> Grid:
    """Return the rows and columns that blocks can touch: official sampling never reaches the last of either."""
    edge = mask.sampling == "official"
    return grid[0] - edge, grid[1] - edge


def _blocks_of(mask: MaskConfig, grid: Grid, ranges: Ranges, shared: float, uniforms: np.ndarray) -> np.ndarray:
    """Return blocks (..., N) for draws in [0, 1) (..., 4): of scale, aspect ratio, top and left.

    Official sampling has one draw for both scale and aspect ratio of all blocks of a step: `shared`.
    """
    height, width = reachable_grid(mask, grid)
    scale, aspect, down, right = np.moveaxis(uniforms, -1, 0)
    if mask.sampling == "official":
        scale = aspect = shared
    h, w = _block_size(mask, grid, ranges, scale, aspect)
    return _placed(grid, h, w, down, right, (height, width))


def _placed(grid: Grid, h: np.ndarray, w: np.ndarray, down: np.ndarray, right: np.ndarray, within: Grid) -> np.ndarray:
    """Return (..., N): rectangles of h rows and w columns, each at the place that draws in [0, 1) say among those `within`.

    A block of 5 rows fits into 15 at 11 places: a draw of 0.5 puts its top at row floor(0.5 * 11) = 5.
    """
    in_rows = _interval(np.floor(down * (within[0] - h + 1)), h, grid[0])
    in_cols = _interval(np.floor(right * (within[1] - w + 1)), w, grid[1])
    return (in_rows[..., :, None] & in_cols[..., None, :]).reshape(*down.shape, grid[0] * grid[1])


def _interval(start: np.ndarray, length: np.ndarray, side: int) -> np.ndarray:
    """Return (..., side) bool: true at the `length` places from `start` on."""
    place = np.arange(side)
    return (place >= start[..., None]) & (place < (start + length)[..., None])


def _block_size(mask: MaskConfig, grid: Grid, ranges: Ranges, scale_draw, aspect_draw) -> tuple[np.ndarray, np.ndarray]:
    """Return heights and widths in patches for draws in [0, 1) over the ranges of scale and aspect ratio (height / width).

    On a grid of 16 x 16, scale 0.2 and aspect ratio 1.5 are an area of floor(51.2) = 51 patches: round(sqrt(51 * 1.5)) = 9
    rows and round(sqrt(51 / 1.5)) = 6 columns.
    """
    (scale, scale_end), (aspect, aspect_end) = ranges
    height, width = reachable_grid(mask, grid)
    area = np.floor(grid[0] * grid[1] * (scale + scale_draw * (scale_end - scale)))
    aspect = aspect + aspect_draw * (aspect_end - aspect)
    return np.minimum(np.rint(np.sqrt(area * aspect)), height), np.minimum(np.rint(np.sqrt(area / aspect)), width)


def smallest_block(mask: MaskConfig, grid: Grid, ranges: Ranges) -> int:
    """Return the patches of the smallest block that can be drawn.

    A block's area is a step function of the draw, constant between the draws at which a rounding tips over: where the area
    reaches a whole number, or a height or width reaches a half. It is computed at each of these places and half-way to the
    next. A block of 40 patches tips from 7 rows to 8 at the aspect ratio 7.5**2 / 40 = 1.41; aspect ratios from 0.75 to 1.5
    reach it at the draw (1.41 - 0.75) / 0.75 = 0.875. Draws of scale and aspect ratio that are independent are worst at the
    smallest scale, whatever the aspect ratio; official sampling has one draw for both.
    """
    (scale, scale_end), (aspect, aspect_end) = ranges
    patches, half = grid[0] * grid[1], np.arange(max(grid)) + 0.5
    areas = np.arange(max(1, int(patches * scale)), int(patches * scale_end) + 2)[:, None]
    tips = [((areas / patches - scale) / (scale_end - scale or 1)).ravel()]  # draws at which the area tips
    # Rows are sqrt(area * ratio) and columns sqrt(area / ratio): these are half a patch more than a whole number.
    tips += [((tip - aspect) / (aspect_end - aspect or 1)).ravel() for tip in (half**2 / areas, areas / half**2)]
    tips = np.unique(np.clip(np.concatenate([[0.0, 1.0], *tips]), 0.0, np.nextafter(1.0, 0.0)))
    draws = np.concatenate([tips, (tips[1:] + tips[:-1]) / 2])
    h, w = _block_size(mask, grid, ranges, draws if mask.sampling == "official" else 0.0, draws)
    return int((h * w).min())
