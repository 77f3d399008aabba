"""The I-JEPA loss (paper, equation 1): the distance of predictions to normalised targets, a mean over images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.masks.packed import Blocks
from fastjepa.ranks.collectives import mean_over_ranks
from fastjepa_kernels import target_loss

DISTANCES = {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss}  # the official code's, beta 1, and the paper's


class LayerNormalization:
    """Normalisation of the method: each target at mean 0 and variance 1, without affine, inside the kernel of the loss."""

    def loss(self, prediction: Tensor, target: Tensor, blocks: Blocks, kind: str) -> Tensor:
        """Return the loss; arguments as in `jepa_loss`."""
        return target_loss(prediction, target, blocks.target_rows, blocks.weight, kind)

    def extra_bytes(self, queries: int, targets: int, element: int) -> int:
        """Return the bytes a feature that the loss keeps beside predictions of so many bytes an element and targets."""
        return 0


class NoNormalization(LayerNormalization):
    """Targets as they are."""

    def normalized(self, target: Tensor) -> Tensor:
        """Return the targets (U, D) that are predicted, in fp32."""
        return target.float()

    def loss(self, prediction: Tensor, target: Tensor, blocks: Blocks, kind: str) -> Tensor:
        wanted = self.normalized(target).index_select(0, blocks.target_rows)  # (Q, D)
        rows = DISTANCES[kind](prediction.float(), wanted, reduction="none").mean(dim=1)  # (Q,)
        return (rows * blocks.weight).sum()

    def extra_bytes(self, queries: int, targets: int, element: int) -> int:
        """Count the target of each query, and predictions in fp32 where they are not; fp32 has 4 bytes."""
        return 4 * queries * (1 if element == 4 else 2)


class BatchNormalization(NoNormalization):
    """Targets standardised over the batch: every feature over the U rows of a step, of every rank."""

    def normalized(self, target: Tensor) -> Tensor:
        return standardised_targets(target.float())

    def extra_bytes(self, queries: int, targets: int, element: int) -> int:
        """Count the standardised targets as well."""
        return super().extra_bytes(queries, targets, element) + 4 * targets


NORMALIZATIONS = {"layer": LayerNormalization(), "none": NoNormalization(), "batch": BatchNormalization()}  # loss.normalize


def jepa_loss(
    prediction: Tensor,
    target: Tensor,
    blocks: Blocks,
    kind: str = "smooth_l1",
    normalization: LayerNormalization = NORMALIZATIONS["layer"],
) -> Tensor:
    """Return the mean over images of the mean over (context mask, target block) of the mean distance to the target.

    Args:
        prediction: (Q, D) predictor output, any float dtype; computed on in fp32.
        target: (U, D) targets, as an object of `loss.targets` gives them.
        blocks: says which target row each prediction is of, and its weight.
        kind: smooth_l1 (beta 1, the official code) or l2 (the paper).
        normalization: what the targets are normalised by, an object of NORMALIZATIONS.

    Returns:
        fp32 scalar.
    """
    return normalization.loss(prediction, target, blocks, kind)


def standardised_targets(target: Tensor) -> Tensor:
    """Return (U, D) with every feature at mean 0 and variance 1 over the U rows of all ranks, without affine, eps 1e-5.

    Every rank must take part. The rows of a step's other micro-batches are not seen: the config refuses them.
    """
    rows = mean_over_ranks(target.new_full((), len(target)))  # a rank's, in the mean: sums are taken as means too
    centred = target - mean_over_ranks(target.sum(dim=0)) / rows
    return centred * torch.rsqrt(mean_over_ranks(centred.square().sum(dim=0)) / rows + 1e-5)
