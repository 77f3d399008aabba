"""Masks of a grid as tests look at them: drawn from few settings, with the boxes they fill."""

import numpy as np

from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import Config, MaskConfig
from fastjepa.masks.check import check_masks
from fastjepa.masks.draw import draw_masks
from fastjepa.masks.layouts import Masking
from fastjepa.masks.statistics import mask_statistics

GRID = (16, 16)


def settings(grid: tuple[int, int] = GRID, seed: int = 0, **mask: object) -> Config:
    return config_from_dict(
        {"data": {"crop_size": [4 * grid[0], 4 * grid[1]]}, "mask": {"patch_size": 4} | mask, "runtime": {"seed": seed}}
    )


def draw(mask: MaskConfig, slots: int, step: int = 0, grid: tuple[int, int] = GRID, seed: int = 0):
    return draw_masks(Masking(mask, grid, seed), step, range(slots), slots)


def check(config: Config, total: int) -> None:
    check_masks(Masking.of(config), total)


def statistics(config: Config, groups: int) -> dict[str, object]:
    return mask_statistics(Masking.of(config), groups)


def lengths(mask: np.ndarray) -> np.ndarray:
    return mask.sum(axis=-1)


def boxes(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(M, N) solid rectangles -> (M, 4) top, left, height, width; fails where one is not solid."""
    cells = mask.reshape(-1, *grid)
    in_rows, in_cols = cells.any(axis=2), cells.any(axis=1)
    assert np.array_equal(cells, in_rows[:, :, None] & in_cols[:, None, :])
    found = np.stack([in_rows.argmax(1), in_cols.argmax(1), in_rows.sum(1), in_cols.sum(1)], axis=1)
    for side, start, size in ((in_rows, found[:, 0], found[:, 2]), (in_cols, found[:, 1], found[:, 3])):
        place = np.arange(side.shape[1])
        assert np.array_equal(side, (place >= start[:, None]) & (place < (start + size)[:, None]))
    return found
