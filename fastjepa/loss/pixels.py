"""Pixels predicted beside targets, for `loss.pixel_weight`: a second loss, MAE's, on another part of the same prediction."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from fastjepa.loader.batch import Batch
from fastjepa.loss.normalizations import NORMALIZATIONS, LayerNormalization, Target
from fastjepa.loss.step_targets import StepTargets
from fastjepa.loss.targets import TARGETS, OutputTargets, TeacherTargets
from fastjepa.masks.packed import Blocks
from fastjepa.model.vit import Encoder


class TargetAndPixels(NamedTuple):
    """Targets of a micro-batch, and the pixels of the same patches."""

    target: Target
    pixels: Tensor  # (U, C * p * p) fp32, of normalised images


class TargetsAndPixels:
    """Targets of another object, with the pixels of the same patches beside them."""

    def __init__(self, targets: OutputTargets | TeacherTargets | StepTargets):
        self.targets = targets

    def __call__(self, target_encoder: Encoder, batch: Batch) -> TargetAndPixels:
        """Return the targets and the pixels."""
        return TargetAndPixels(self.targets(target_encoder, batch), TARGETS["pixels"](target_encoder, batch))

    def surveyed(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Return the micro-batches of a step, after a look at them where a target depends on all of them."""
        return self.targets.surveyed(batches)

    def watched(self, found: TargetAndPixels, context: Tensor) -> Tensor:
        """Return the features whose collapse is to be seen."""
        return self.targets.watched(found.target, context)


class NormalizationAndPixels:
    """Loss of another normalisation on the first part of a prediction, and a weighted one on its last part, the pixels.

    Those of each patch are normalised to mean 0 and variance 1, as in MAE (He et al., 2022). Example: features 64 wide and
    RGB patches of 4 pixels make a prediction 64 + 48 wide.
    """

    def __init__(self, features: LayerNormalization, weight: float, width: int):
        """Take what normalises the targets, the weight of the second loss, and the width of its part of a prediction."""
        self.features, self.weight, self.width = features, weight, width

    def loss(self, prediction: Tensor, found: TargetAndPixels, blocks: Blocks, kind: str) -> Tensor:
        """Return the loss; arguments as in `jepa_loss`."""
        first, last = prediction.split((prediction.shape[1] - self.width, self.width), dim=1)
        on_pixels = NORMALIZATIONS["layer"].loss(last, found.pixels, blocks, kind)
        return self.features.loss(first, found.target, blocks, kind) + self.weight * on_pixels

    def update(self, finite: Tensor) -> None:
        """Take in what a step has shown of the targets."""
        self.features.update(finite)
