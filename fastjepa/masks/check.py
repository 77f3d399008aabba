"""Refusal of masks that cannot be drawn, and warnings of those that do not mean what they say."""

import warnings

import numpy as np

from fastjepa.errors import ConfigError
from fastjepa.masks.draw import kept_patches
from fastjepa.masks.layouts import (
    Masking,
    Slots,
    context_ranges,
    fewest_patches,
    lay_out,
    reachable_grid,
    smallest_block,
    target_ranges,
)


def check_masks(masking: Masking, total: int) -> None:
    """Refuse masks that cannot be drawn, and warn of those that do not mean what they say; `total` slots a step.

    Warnings name a short last group (its contexts are cut less), and contexts that often keep target patches for want of
    room, as found in the run's own draws.

    Raises:
        ConfigError: a block may be too small for `mask.min_keep`, or no context can be free of its targets.
    """
    mask, grid = masking.mask, masking.grid
    rows, cols = grid
    enough = f"must be more than mask.min_keep: {mask.min_keep}"
    if mask.strategy == "multiblock":
        _check_blocks(masking, enough)
    elif (fewest := min(fewest_patches(mask, grid))) <= mask.min_keep:
        raise ConfigError(
            f"mask.strategy: {mask.strategy} masks on the {rows}x{cols} grid hold as few as {fewest} patches, which {enough}; "
            "lower mask.min_keep or use smaller patches"
        )
    if mask.truncate == "fraction" and kept_patches(masking) <= mask.min_keep:
        raise ConfigError(
            f"mask.context_fraction: {mask.context_fraction} of the {rows}x{cols} grid is {kept_patches(masking)} "
            f"patches, which {enough}; raise the fraction or lower mask.min_keep"
        )
    _warn_of_short_group(masking, total)
    _warn_of_overlap(masking)


def _check_blocks(masking: Masking, enough: str) -> None:
    """Raise ConfigError where a block of a multi-block mask, or the context that one leaves, may be too small."""
    mask, grid = masking.mask, masking.grid
    rows, cols = grid
    target, context = (smallest_block(mask, grid, ranges(mask)) for ranges in (target_ranges, context_ranges))
    for key, area in (("pred_mask_scale", target), ("enc_mask_scale", context)):
        if area <= mask.min_keep:
            raise ConfigError(
                f"mask.{key}: a block on the {rows}x{cols} grid can be as small as {area} patches, which {enough}; "
                "raise the scale, lower mask.min_keep or use smaller patches"
            )
    height, width = reachable_grid(mask, grid)
    if not mask.allow_overlap and height * width - target <= mask.min_keep:
        raise ConfigError(
            f"mask.pred_mask_scale: a target leaves the context at most {height * width - target} patches of the {rows}x{cols} "
            f"grid, which {enough}; lower the scale or mask.min_keep, or set mask.allow_overlap: true"
        )


def _warn_of_short_group(masking: Masking, total: int) -> None:
    """Warn where a step's last group has fewer images: 320 images in groups of 128 leave one of 64."""
    mask = masking.mask
    short = total % mask.truncate_group if total > mask.truncate_group else 0
    if mask.truncate == "batch_min" and mask.share == "image" and short:
        warnings.warn(
            f"mask.truncate_group: the last group of a step holds {short} images instead of {mask.truncate_group} and is cut "
            f"less; make data.batch_size * ranks (now {total}) a multiple of it",
            stacklevel=3,
        )


def _warn_of_overlap(masking: Masking) -> None:
    """Warn where more than 1 % of the contexts of 16 steps contain patches of their own targets."""
    mask, grid = masking.mask, masking.grid
    drawn = [lay_out(mask, grid, Slots(masking.seed, step, 0, 64)) for step in range(16)]
    overlap = np.mean([(context & target.any(axis=1)[:, None]).any(axis=2) for context, target in drawn])
    if not mask.allow_overlap and overlap > 0.01:
        warnings.warn(
            f"mask.min_keep: {overlap:.0%} of contexts contain target patches, as the {grid[0]}x{grid[1]} grid rarely has more "
            f"than {mask.min_keep} beside the targets; lower mask.min_keep or mask.pred_mask_scale",
            stacklevel=3,
        )
