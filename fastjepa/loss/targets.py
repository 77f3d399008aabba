"""Targets: what the predictor is to predict, chosen by `loss.target`, before the loss normalises it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.data.pixels import unit_of
from fastjepa.loader.batch import Batch
from fastjepa.loss.normalizations import Target
from fastjepa.model.vit import Encoder
from fastjepa_kernels import patchify_tokens
from fastjepa_kernels.layers import MaskedPatchEmbed


@dataclass(frozen=True)
class OutputTargets:
    """Targets of the method: the target encoder sees the whole image, and gives its output on the U rows that are in any
    target block; that of its final norm, or of the blocks that `layers` numbers.
    """

    layers: tuple[int, ...] | None = None

    runs_network = True

    def __call__(self, target_encoder: Encoder, batch: Batch) -> Target:
        """Return the targets, (U, D), or those of each layer."""
        return target_encoder(batch.images, wanted=batch.target, layers=self.layers)

    def surveyed(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Return the micro-batches of a step, after a look at them where a target depends on all of them."""
        return batches

    def watched(self, target: Target, context: Tensor) -> Tensor:
        """Return the features whose collapse is to be seen: the targets, of the deepest layer, or, where they are none, those
        of the context.
        """
        return target if self.layers is None else target[-1]


class MaskedInputTargets(OutputTargets):
    """Targets of the masked input: the target encoder sees each target block alone, a sequence each (paper, appendix)."""

    def __call__(self, target_encoder: Encoder, batch: Batch) -> Target:
        """Return the targets, (U, D), block by block, or those of each layer."""
        return target_encoder(batch.images, batch.target, layers=self.layers)


class PixelTargets(OutputTargets):
    """Pixels of each patch of normalised images, in fp32; the target encoder is not run.

    With loss.normalize layer each patch then has mean 0 and variance 1, as in MAE (He et al., 2022), with an eps of 1e-5.
    """

    runs_network = False

    def __call__(self, target_encoder: Encoder, batch: Batch) -> Tensor:
        """Return the targets, (U, C * p * p)."""
        embed = target_encoder.patch_embed
        mean_std = (None, None) if batch.images.is_floating_point() else (embed.mean, embed.std)
        return patchify_tokens(batch.images, batch.target.idx, *mean_std, embed.patch_size, torch.float32)

    def watched(self, target: Target, context: Tensor) -> Tensor:
        """Return the context features: pixels cannot collapse."""
        return context


class TeacherTargets:
    """Targets of another object, made by a frozen teacher in place of the target encoder, which is not run.

    The teacher sees the same crops, normalised with its own mean and deviation. Where its patches have another size, crops
    are resized (antialiased, bilinear) so that they are cut into the same grid: 14 x 14 patches of 14 pixels are 196 x 196.
    """

    def __init__(self, targets: OutputTargets, teacher: Encoder):
        """Take what asks the target network, and the teacher, whose positions are of the run's grid."""
        self.targets, self.teacher = targets, teacher

    def __call__(self, target_encoder: Encoder, batch: Batch) -> Target:
        """Return the teacher's targets, (U, D), or those of each layer."""
        return self.targets(self.teacher, replace(batch, images=self.shown(batch.images, target_encoder.patch_embed)))

    def shown(self, images: Tensor, own: MaskedPatchEmbed) -> Tensor:
        """Return images (b, C, H, W) as the teacher takes them; floats have been normalised as `own`, the run's, does."""
        embed, floats = self.teacher.patch_embed, images.is_floating_point()
        if embed.patch_size == own.patch_size and not floats:
            return images  # whole numbers, which the embedding normalises
        pixels = images * _by_channel(own.std) + _by_channel(own.mean) if floats else images.float() / unit_of(images.dtype)
        if embed.patch_size != own.patch_size:
            size = [side // own.patch_size * embed.patch_size for side in images.shape[2:]]
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        return (pixels - _by_channel(embed.mean)) / _by_channel(embed.std)

    def surveyed(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Return the micro-batches of a step, after a look at them where a target depends on all of them."""
        return self.targets.surveyed(batches)

    def watched(self, target: Target, context: Tensor) -> Tensor:
        """Return the context features: those of a frozen teacher cannot collapse."""
        return context


def _by_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


TARGETS = {"output": OutputTargets(), "input": MaskedInputTargets(), "pixels": PixelTargets()}  # by loss.target


def choose_targets(name: str, layers: Literal["last"] | tuple[int, ...]) -> OutputTargets:
    """Return the targets that `loss.target` and `loss.target_layers` name."""
    return TARGETS[name] if layers == "last" else replace(TARGETS[name], layers=layers)
