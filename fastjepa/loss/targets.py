"""Targets: what the predictor is to predict, chosen by `loss.target`, before the loss normalises it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fastjepa.loader.batch import Batch
from fastjepa.loss.normalizations import Target
from fastjepa.model.vit import Encoder
from fastjepa_kernels import patchify_tokens


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


TARGETS = {"output": OutputTargets(), "input": MaskedInputTargets(), "pixels": PixelTargets()}  # by loss.target


def choose_targets(name: str, layers: Literal["last"] | tuple[int, ...]) -> OutputTargets:
    """Return the targets that `loss.target` and `loss.target_layers` name."""
    return TARGETS[name] if layers == "last" else replace(TARGETS[name], layers=layers)
