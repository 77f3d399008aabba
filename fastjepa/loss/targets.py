"""Targets: what the predictor is to predict, chosen by `loss.target`, before the loss normalises it."""

import torch
from torch import Tensor

from fastjepa.loader.batch import Batch
from fastjepa.model.vit import Encoder
from fastjepa_kernels import patchify_tokens


class OutputTargets:
    """Targets of the method: the target encoder sees the whole image, and gives its output on the U rows that are in any
    target block.
    """

    runs_network = True

    @torch.no_grad()
    def __call__(self, target_encoder: Encoder, batch: Batch) -> Tensor:
        """Return the targets, (U, D)."""
        return target_encoder(batch.images, wanted=batch.target)

    def watched(self, target: Tensor, context: Tensor) -> Tensor:
        """Return the features whose collapse is to be seen: the targets, or, where they are none, those of the context."""
        return target


class MaskedInputTargets(OutputTargets):
    """Targets of the masked input: the target encoder sees each target block alone, a sequence each (paper, appendix)."""

    @torch.no_grad()
    def __call__(self, target_encoder: Encoder, batch: Batch) -> Tensor:
        """Return the targets, (U, D), block by block."""
        return target_encoder(batch.images, batch.target)


class PixelTargets(OutputTargets):
    """Pixels of each patch of normalised images, in fp32; the target encoder is not run.

    With loss.normalize layer each patch then has mean 0 and variance 1, as in MAE (He et al., 2022), with an eps of 1e-5.
    """

    runs_network = False

    @torch.no_grad()
    def __call__(self, target_encoder: Encoder, batch: Batch) -> Tensor:
        """Return the targets, (U, C * p * p)."""
        embed = target_encoder.patch_embed
        mean_std = (None, None) if batch.images.is_floating_point() else (embed.mean, embed.std)
        return patchify_tokens(batch.images, batch.target.idx, *mean_std, embed.patch_size, torch.float32)

    def watched(self, target: Tensor, context: Tensor) -> Tensor:
        """Return the context features: pixels cannot collapse."""
        return context


TARGETS = {"output": OutputTargets(), "input": MaskedInputTargets(), "pixels": PixelTargets()}  # by loss.target
