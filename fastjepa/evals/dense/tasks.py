"""Dense tasks: what a label image says of its pixels, what a patch is worth, and how predictions are counted.

A task is chosen once and holds all that differs between segmentation, depth and surface normals. Its K channels are the
classes, one depth, or three coordinates. Counts are kept by image, so that images can be resampled: scores are functions of
their sums, over all pixels of all images together. torchmetrics counts what it has a metric for.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastjepa.errors import UserError

DenseTaskName = Literal["segmentation", "depth", "normals"]
NO_CLASS = -1  # of a pixel that does not count
LEAST_DEPTH = 1e-3  # of a prediction: ratios of depths need one above 0
DELTA = 1.25  # a depth counts as right within this factor
LENGTH_SLACK = 0.1  # a normal of 8-bit coordinates is at most 0.01 from length 1


class Score(NamedTuple):
    """A number that a task is measured by."""

    title: str
    factor: float  # from the number to what is shown
    form: str  # of what is shown
    best: float  # of a perfect prediction


class DenseTask(Protocol):
    """Every task has these; b images of (H, W) pixels, N patches of p x p pixels, K channels."""

    name: DenseTaskName
    bands: int  # of a label image
    channels: int  # K
    scores: dict[str, Score]

    def check(self, stored: np.ndarray, file: Path) -> None:
        """Raise UserError for a label image (H, W) or (H, W, 3) that says something unknown."""

    def truth(self, stored: np.ndarray) -> Tensor:
        """Return what label images (b, H, W) or (b, H, W, 3) say: classes (b, H, W) int64, or numbers (b, K, H, W) fp32."""

    def patch_values(self, truth: Tensor, patch: int) -> tuple[Tensor, Tensor]:
        """Return the mean (b, N, K) fp32 of each patch's pixels that have a value, and how many (b, N) have one."""

    def predict(self, maps: Tensor) -> Tensor:
        """Return the prediction (H, W) or (K, H, W) that maps (K, H, W), enlarged to the label image's size, stand for."""

    def counts(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Return what is counted of one image, (S,) fp64; `truth` as of one image."""

    def score(self, counts: Tensor) -> dict[str, Tensor]:
        """Return the scores of summed counts (..., S), each (...)."""


@dataclass(frozen=True)
class Segmentation:
    """A class for every pixel.

    Label images hold numbers: those of a palette and not its colours. Where 0 is ignored, classes are numbered from 1.
    """

    classes: int
    ignored: int | None = None  # the number of pixels that do not count
    name: DenseTaskName = "segmentation"
    bands: int = 1
    scores: dict[str, Score] = field(
        default_factory=lambda: {"miou": Score("mIoU, %", 100, ".1f", 1), "accuracy": Score("pixels right, %", 100, ".1f", 1)}
    )

    @property
    def channels(self) -> int:
        """Return the number of classes."""
        return self.classes

    @property
    def first(self) -> int:
        """Return the number of the first class."""
        return int(self.ignored == 0)

    def check(self, stored: np.ndarray, file: Path) -> None:
        """Raise UserError for a number that is no class."""
        found = np.unique(stored)
        first, last = self.first, self.first + self.classes - 1
        unknown = found[((found < first) | (found > last)) & (found != self.ignored)]
        if len(unknown):
            ignored = "no number is ignored" if self.ignored is None else f"{self.ignored} is ignored"
            raise UserError(f"{file}: label {unknown[0]} is none of the {self.classes} classes, {first} to {last}, and "
                            f"{ignored}; say --classes or --ignore-index, or repair the file")  # fmt: skip

    def truth(self, stored: np.ndarray) -> Tensor:
        """Return the classes from 0, NO_CLASS for pixels that do not count."""
        values = torch.from_numpy(stored.astype(np.int64))
        return (
            values - self.first if self.ignored is None else torch.where(values == self.ignored, NO_CLASS, values - self.first)
        )

    def patch_values(self, truth: Tensor, patch: int) -> tuple[Tensor, Tensor]:
        """Return the share of each class: of 3 pixels of class 0 and 1 of class 2, with 3 classes, 0.75, 0, 0.25."""
        cells = patch_pixels(truth[:, None], patch)[:, :, 0] - NO_CLASS  # (b, N, p * p), 0 for none
        counts = torch.zeros(*cells.shape[:2], self.classes + 1, device=truth.device)
        counts.scatter_add_(2, cells, torch.ones(1, device=truth.device).expand(cells.shape))
        weight = counts[..., 1:].sum(dim=2)
        return counts[..., 1:] / weight.clamp(min=1)[..., None], weight

    def predict(self, maps: Tensor) -> Tensor:
        """Return the class of the largest map, (H, W) int64."""
        return maps.argmax(dim=0)

    def counts(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Return the pixels of each class that are rightly given it, wrongly given it, and wrongly not."""
        from torchmetrics.functional.classification import multiclass_stat_scores

        options = {"average": "none", "ignore_index": NO_CLASS, "validate_args": False}
        found = multiclass_stat_scores(predicted[None], truth[None], self.classes, **options)
        return found[:, [0, 1, 3]].double().flatten()  # true positives, false positives, false negatives of (C, 5)

    def score(self, counts: Tensor) -> dict[str, Tensor]:
        """Return the mean over classes of intersection over union, classes that nothing was given and none has left out,
        and the share of pixels that are right.
        """
        right, wrong, missed = counts.unflatten(-1, (self.classes, 3)).unbind(-1)  # (..., C) each
        return {"miou": (right / (right + wrong + missed)).nanmean(dim=-1),
                "accuracy": right.sum(dim=-1) / (right + missed).sum(dim=-1)}  # fmt: skip


@dataclass(frozen=True)
class Depth:
    """A distance for every pixel; a label image holds `scale` times the distance, and 0 where there is none."""

    scale: float
    name: DenseTaskName = "depth"
    bands: int = 1
    channels: int = 1
    scores: dict[str, Score] = field(
        default_factory=lambda: {
            "rmse": Score("RMSE", 1, ".3f", 0),
            "delta": Score(f"δ < {DELTA}, %", 100, ".1f", 1),
            "absrel": Score("relative error, %", 100, ".1f", 0),
        }
    )

    def check(self, stored: np.ndarray, file: Path) -> None:
        """Raise UserError for a number below 0."""
        if (stored < 0).any():
            raise UserError(f"{file}: holds {stored.min()}, and a distance is above 0, or 0 for none; repair the file")

    def truth(self, stored: np.ndarray) -> Tensor:
        """Return distances (b, 1, H, W), 0 for none."""
        return torch.from_numpy(stored.astype(np.float32))[:, None] / self.scale

    def patch_values(self, truth: Tensor, patch: int) -> tuple[Tensor, Tensor]:
        """Return the mean distance."""
        return _mean_values(truth, truth[:, :1] > 0, patch)

    def predict(self, maps: Tensor) -> Tensor:
        """Return the distances (1, H, W), at least LEAST_DEPTH."""
        return maps.clamp(min=LEAST_DEPTH)

    def counts(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Return the number of pixels, and their sums of squared error, of relative error, and of those within DELTA."""
        from torchmetrics.functional.regression import mean_absolute_percentage_error, mean_squared_error

        known = truth > 0
        found, true = predicted[known].double(), truth[known].double()
        if not len(true):
            return torch.zeros(4, dtype=torch.float64, device=truth.device)
        near = (torch.maximum(found / true, true / found) < DELTA).sum()
        means = mean_squared_error(found, true), mean_absolute_percentage_error(found, true)
        return torch.stack([near.new_tensor(len(true)).double(), *(len(true) * mean for mean in means), near.double()])

    def score(self, counts: Tensor) -> dict[str, Tensor]:
        """Return the root of the mean squared error, the share within DELTA, and the mean relative error."""
        pixels, squares, relative, near = counts.unbind(-1)
        return {"rmse": (squares / pixels).sqrt(), "delta": near / pixels, "absrel": relative / pixels}


@dataclass(frozen=True)
class Normals:
    """A unit vector for every pixel; a label image holds coordinates c as round(255 (c + 1) / 2), red, green and blue.

    A pixel whose vector is not of length 1 has no value.
    """

    name: DenseTaskName = "normals"
    bands: int = 3
    channels: int = 3
    scores: dict[str, Score] = field(default_factory=lambda: {"angle": Score("mean angle, degrees", 1, ".1f", 0)})

    def check(self, stored: np.ndarray, file: Path) -> None:
        """Raise UserError for an image without a single unit vector."""
        if not self.truth(stored[None]).any():
            raise UserError(f"{file}: no pixel's colour is a unit vector; normals are stored as round(255 (c + 1) / 2)")

    def truth(self, stored: np.ndarray) -> Tensor:
        """Return unit vectors (b, 3, H, W), zeros for none."""
        vectors = torch.from_numpy(stored.astype(np.float32)).permute(0, 3, 1, 2) * (2 / 255) - 1
        length = vectors.norm(dim=1, keepdim=True)
        return torch.where((length - 1).abs() <= LENGTH_SLACK, vectors / length.clamp(min=LENGTH_SLACK), 0)

    def patch_values(self, truth: Tensor, patch: int) -> tuple[Tensor, Tensor]:
        """Return the mean vector, which is shorter than 1 where they differ."""
        return _mean_values(truth, truth.any(dim=1, keepdim=True), patch)

    def predict(self, maps: Tensor) -> Tensor:
        """Return unit vectors (3, H, W)."""
        return normalize(maps, dim=0)

    def counts(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Return the number of pixels and the sum of their angles in degrees."""
        from torchmetrics.functional.regression import cosine_similarity

        known = truth.any(dim=0)
        if not known.any():
            return torch.zeros(2, dtype=torch.float64, device=truth.device)
        cosine = cosine_similarity(predicted[:, known].T.double(), truth[:, known].T.double(), reduction="none")
        return torch.stack([known.sum().double(), cosine.clamp(-1, 1).acos().rad2deg().sum()])

    def score(self, counts: Tensor) -> dict[str, Tensor]:
        """Return the mean angle between prediction and truth."""
        return {"angle": counts[..., 1] / counts[..., 0]}


def patch_pixels(images: Tensor, patch: int) -> Tensor:
    """Return the pixels of patches, (b, N, C, p * p), of images (b, C, H, W); patches go row by row."""
    b, channels, height, width = images.shape
    cells = images.view(b, channels, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, channels, patch * patch)


def _mean_values(truth: Tensor, known: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Return the mean (b, N, K) over the pixels of a patch that are `known` (b, 1, H, W), and their number (b, N)."""
    weight = patch_pixels(known.float(), patch).sum(dim=3)  # (b, N, 1)
    return patch_pixels(truth * known, patch).sum(dim=3) / weight.clamp(min=1), weight[..., 0]


def require_torchmetrics() -> None:
    """Raise UserError where torchmetrics is missing: before features are made."""
    try:
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise UserError("dense evaluation needs torchmetrics; run: pip install 'fastjepa[eval]'") from error
