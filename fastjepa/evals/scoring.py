"""What an evaluation hands back, and the two statistics all of them share: an interval and a validation split."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastjepa.errors import ConfigError
from fastjepa.rng import SPLIT_STREAM, generator

Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution

# Steps of the SPLITS stream: each use of randomness in an evaluation has its own. Epoch e of a probe uses PROBE + e, view v
# of the training images VIEWS + v.
TRAIN_DRAW, TEST_DRAW, VALIDATION_DRAW, PROBE_DRAW = range(4)
LABELLED_DRAW, VIEW_DRAW = 1 << 32, 1 << 33


@dataclass(frozen=True)
class Features:
    """Features of n images in source order: `x` (n, D) fp32 and the classes `y` (n,) int64, both on the host.

    `views`: the same of augmented views of the same images, for probes that take one in each epoch; may be none.
    """

    x: Tensor
    y: Tensor
    views: tuple[Tensor, ...] = ()


class Labelled(Protocol):
    """Features, patch features or images, of which a statistic needs the classes `y` (n,) int64 alone."""

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
        return dataclasses.asdict(self)


def score_predictions(
    predicted: Tensor, train: Labelled, test: Labelled, chosen: dict, validation_accuracy: float | None
) -> Result:
    """The Result of `predicted` (n_test,) int64 classes."""
    hits, n = int((predicted == test.y).sum()), len(test.y)
    return Result(hits / n, wilson_interval(hits, n), len(train.y), n, chosen, validation_accuracy)


def wilson_interval(hits: int, n: int) -> list[float]:
    """Wilson score interval [low, high] at 95 % for a share `hits / n` (Wilson 1927)."""
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"wilson: {hits} of {n} is not a share")
    share, square = hits / n, Z95 * Z95
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = Z95 / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return [0.0 if hits == 0 else centre - half, 1.0 if hits == n else centre + half]


def check_labels(train: Labelled, test: Labelled, classes: int) -> None:
    """ConfigError when the classes of the two sets cannot be compared."""
    if len(train.y) == 0 or len(test.y) == 0:
        raise ConfigError(f"{len(train.y)} training and {len(test.y)} test images: an evaluation needs both")
    highest = int(max(train.y.max(), test.y.max()))
    if highest >= classes:
        raise ConfigError(f"label {highest} in data of {classes} classes: labels count from 0")
    known = np.unique(train.y.numpy())
    if len(known) < 2:
        raise ConfigError(f"the {len(train.y)} training images hold {len(known)} class: an evaluation needs at least two")
    unknown = np.setdiff1d(test.y.numpy(), known)
    if len(unknown):
        raise ConfigError(f"test class {unknown[0]} has no training image: use more training images")


def validation_split(y: Tensor, every: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split training images into (fit, validation) indices, int64: one image in `every` of each class validates.

    Classes with fewer than `every` images only fit. Raises ConfigError when no class has that many.
    """
    order = np.argsort(generator(seed, SPLIT_STREAM, VALIDATION_DRAW).random(len(y)))
    by_class = order[np.argsort(y.numpy()[order], kind="stable")]
    counts = np.bincount(y.numpy())
    rank = np.arange(len(y)) - np.repeat(np.cumsum(counts) - counts, counts)  # place of each image within its class
    validates = rank % every == every - 1
    if not validates.any():
        raise ConfigError(f"no class has {every} training images to choose hyperparameters on: use more training images")
    return _index(by_class[~validates]), _index(by_class[validates])


def subset(count: int | None, total: int, seed: int, step: int) -> np.ndarray:
    """Rising indices of at most `count` of `total` images, drawn at random; all of them when None."""
    if count is None or count >= total:
        return np.arange(total)
    return np.sort(generator(seed, SPLIT_STREAM, step).permutation(total)[:count])


def _index(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.sort(values).astype(np.int64))
