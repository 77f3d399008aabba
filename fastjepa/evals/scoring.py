"""The result of an evaluation, and what all of them share: an interval, a validation split, the choice of a setting."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastjepa.errors import UserError
from fastjepa.rng import SPLIT_STREAM, generator

Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution

# Steps of SPLIT_STREAM: each use of randomness in an evaluation has its own. Epoch e of a probe uses PROBE_DRAW + e, view v
# of the training images VIEW_DRAW + v.
TRAIN_DRAW, TEST_DRAW, VALIDATION_DRAW, PROBE_DRAW = range(4)
LABELLED_DRAW, VIEW_DRAW = 1 << 32, 1 << 33

CLASS_SHARE = 6  # images a class whose draw is not left to chance: the choice of a setting holds out one in six at most

Setting = TypeVar("Setting")


@dataclass(frozen=True)
class Features:
    """Features of n images in source order: `x` (n, D) fp32 and the classes `y` (n,) int64, both on the host.

    `views`: features of augmented views of the same images, (n, D) each, for probes that take one in each epoch; may be none.
    """

    x: Tensor
    y: Tensor
    views: tuple[Tensor, ...] = ()


class Labelled(Protocol):
    """Anything with classes `y` (n,) int64, such as features, patch features or images; a statistic needs no more."""

    y: Tensor


@dataclass(frozen=True)
class Result:
    """Accuracy on `n_test` held-out images, its Wilson 95 % interval [low, high], and what the sweep chose."""

    accuracy: float
    ci95: list[float]
    n_train: int
    n_test: int
    chosen: dict[str, float]
    validation_accuracy: float | None  # of the chosen setting, on images kept out of the training images

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON writes them."""
        return dataclasses.asdict(self)


def score_predictions(
    predicted: Tensor, train: Labelled, test: Labelled, chosen: dict, validation_accuracy: float | None
) -> Result:
    """Compare `predicted` (n_test,) int64 classes with those of the test images."""
    hits, n = int((predicted == test.y).sum()), len(test.y)
    return Result(hits / n, wilson_interval(hits, n), len(train.y), n, chosen, validation_accuracy)


def wilson_interval(hits: int, n: int) -> list[float]:
    """Return the Wilson score interval [low, high] at 95 % for a share `hits / n` (Wilson 1927)."""
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"wilson_interval: {hits} of {n} is not a share")
    share, square = hits / n, Z95 * Z95
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = Z95 / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return [0.0 if hits == 0 else centre - half, 1.0 if hits == n else centre + half]


def check_labels(train: Labelled, test: Labelled, classes: int) -> None:
    """Raise UserError when the classes of the two sets cannot be compared."""
    if len(train.y) == 0 or len(test.y) == 0:
        raise UserError(f"{len(train.y)} training and {len(test.y)} test images: an evaluation needs both")
    highest = int(max(train.y.max(), test.y.max()))
    if highest >= classes:
        raise UserError(f"label {highest} in data of {classes} classes: labels count from 0")
    known = np.unique(train.y.numpy())
    if len(known) < 2:
        raise UserError(f"the {len(train.y)} training images hold {len(known)} class: an evaluation needs at least two")
    unknown = np.setdiff1d(test.y.numpy(), known)
    if len(unknown):
        raise UserError(f"test class {unknown[0]} has no training image: use more training images")


def choose_setting(
    y: Tensor, every: int, seed: int, attempt: Callable[[Tensor, Tensor], Mapping[Setting, Tensor]], remedy: str = ""
) -> tuple[Setting, float]:
    """Return the setting that does best on training images kept out, the first of equals, and its accuracy there.

    Args:
        y: classes (n,) int64 of the training images, of which one in `every` is kept out.
        attempt: from indices (fit, held), both int64, to {setting: the classes (len(held),) that it gives the images `held`
            after it was fitted on the images `fit`}.
        remedy: what else helps where there are too few images; ends the sentence of the UserError.
    """
    fit, held = validation_split(y, every, seed, remedy)
    accuracy = {setting: float((found == y[held]).double().mean()) for setting, found in attempt(fit, held).items()}
    best = max(accuracy, key=accuracy.__getitem__)
    return best, accuracy[best]


def validation_split(y: Tensor, every: int, seed: int, remedy: str = "") -> tuple[Tensor, Tensor]:
    """Split training images into (fit, held) indices, int64: one image in `every` of each class is held out.

    Classes with fewer than `every` images only fit. Raises UserError when no class has that many.
    """
    order = np.argsort(generator(seed, SPLIT_STREAM, VALIDATION_DRAW).random(len(y)))
    held = places_in_class(y.numpy()[order]) % every == every - 1
    if not held.any():
        raise UserError(f"no class has {every} training images, the fewest that settings are chosen on: use more training "
                        f"images of each{remedy}")  # fmt: skip
    return _index(order[~held]), _index(order[held])


def places_in_class(y: np.ndarray) -> np.ndarray:
    """Return the place of each image within its class, (n,) int64: of classes [7, 2, 7, 7, 2] it is [0, 0, 1, 2, 1]."""
    by_class = np.argsort(y, kind="stable")
    counts = np.unique(y, return_counts=True)[1]
    places = np.empty(len(y), np.int64)
    places[by_class] = np.arange(len(y)) - np.repeat(np.cumsum(counts) - counts, counts)
    return places


def subset(count: int | None, total: int, seed: int, step: int) -> np.ndarray:
    """Return rising indices of at most `count` of `total` images, drawn by `seed` at `step`; all of them for None."""
    if count is None or count >= total:
        return np.arange(total)
    return np.sort(generator(seed, SPLIT_STREAM, step).permutation(total)[:count])


def stratified_subset(count: int | None, y: np.ndarray, seed: int, step: int) -> np.ndarray:
    """Return rising indices of at most `count` images of the classes `y` (n,), drawn by `seed` at `step`; all for None.

    Each class gets its share of `count`, as far as CLASS_SHARE images, and at least one; beyond that chance decides. 20 of
    90 images of class 0 and 10 of class 1 are at least 6 of class 0, whose share is 18, and 2 of class 1. A random draw of
    that many images in which each class has so many is left as it is. UserError for fewer images than classes.
    """
    if count is None or count >= len(y):
        return np.arange(len(y))
    _, number, sizes = np.unique(y, return_inverse=True, return_counts=True)
    if count < len(sizes):
        raise UserError(f"{count} training images of {len(sizes)} classes, and each class needs one: use {len(sizes)} or more "
                        "(--n-train)")  # fmt: skip
    order = generator(seed, SPLIT_STREAM, step).permutation(len(y))
    place, due = places_in_class(y[order]), np.clip(count * sizes // len(y), 1, CLASS_SHARE)[number[order]]
    # First the first image of each class, then second ones where due ..., then all others as they were drawn.
    first = np.argsort(np.where(place < due, place, CLASS_SHARE), kind="stable")
    return np.sort(order[first[:count]])


def _index(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.sort(values).astype(np.int64))
