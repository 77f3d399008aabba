"""Normalisations of targets, by `loss.normalize`: what a prediction is compared with, and by which pass over memory.

Targets are the rows (U, D) of one layer, or those of each of several. Every layer is normalised by itself. A prediction as
wide as all of them is compared with each; one as wide as one of several with their average, normalised again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.masks.packed import Blocks
from fastjepa.model.moments import RunningMoments
from fastjepa.ranks.collectives import mean_over_ranks
from fastjepa_kernels import target_loss
from fastjepa_kernels.target_loss import layers_of, predicts_average

DISTANCES = {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss}  # the official code's, beta 1, and the paper's

Target = Tensor | tuple[Tensor, ...]  # (U, D) of a layer, or of each of several


class LossSize(NamedTuple):
    """Size of a loss, for the count of what it holds."""

    queries: int  # rows of the prediction
    width: int  # of the prediction
    targets: int  # rows of a layer's targets
    layers: int
    dim: int  # width of a layer's targets
    element: int  # bytes of a number of the prediction
    pieces: int = 1  # micro-batches of a step

    @property
    def averaged(self) -> bool:
        """Return whether the average of the layers is predicted."""
        return self.layers > 1 and self.width == self.dim


class LayerNormalization:
    """Normalisation of the method: each target at mean 0 and variance 1, without affine, inside the kernel of the loss."""

    def loss(self, prediction: Tensor, target: Target, blocks: Blocks, kind: str) -> Tensor:
        """Return the loss; arguments as in `jepa_loss`."""
        return target_loss(prediction, target, blocks.target_rows, blocks.weight, kind)

    def extra_bytes(self, size: LossSize) -> int:
        """Return the bytes that the loss keeps beside predictions and targets."""
        return 0

    def update(self, finite: Tensor) -> None:
        """Take in what a step has shown of the targets; `finite`, 0-dim bool on the device: whether the step was taken."""
        return None


class NoNormalization(LayerNormalization):
    """Targets as they are."""

    def normalized(self, layers: Sequence[Tensor], first: int = 0) -> list[Tensor]:
        """Return the targets (U, D) of layers in fp32, as they are predicted, numbered from `first`; number L is the average
        of all L.
        """
        return [rows.float() for rows in layers]

    def wanted(self, target: Target, averaged: bool) -> list[Tensor]:
        """Return the targets (U, D) that are predicted: of each layer, or of their average alone."""
        normal = self.normalized(layers_of(target))
        return self.normalized([sum(normal) / len(normal)], len(normal)) if averaged else normal

    def loss(self, prediction: Tensor, target: Target, blocks: Blocks, kind: str) -> Tensor:
        layers = self.wanted(target, predicts_average(prediction, layers_of(target)))
        apart = [
            DISTANCES[kind](part, rows.index_select(0, blocks.target_rows), reduction="none").mean(dim=1)  # (Q,)
            for part, rows in zip(prediction.float().split(layers[0].shape[1], dim=1), layers, strict=True)
        ]
        return (sum(apart) / len(apart) * blocks.weight).sum()

    def extra_bytes(self, size: LossSize) -> int:
        """Count the target of each query, predictions in fp32 where they are not, and the average; fp32 has 4 bytes."""
        kept = size.queries * size.width * (1 if size.element == 4 else 2)
        return 4 * (kept + size.averaged * size.targets * size.dim)


class BatchNormalization(NoNormalization):
    """Targets standardised over the batch: every feature over the U rows of a step, of every rank."""

    def normalized(self, layers: Sequence[Tensor], first: int = 0) -> list[Tensor]:
        return [rows for (rows,) in standardised_layers([[rows.float()] for rows in layers])]

    def extra_bytes(self, size: LossSize) -> int:
        """Count the standardised targets as well: of a whole step, where it has several micro-batches."""
        return super().extra_bytes(size) + 4 * size.targets * size.dim * (size.layers + size.averaged) * size.pieces


class RunningNormalization(NoNormalization):
    """Targets standardised by moments that are averaged over steps, those of this step not among them.

    The average of several layers has moments of its own, those of layer number L.
    """

    def __init__(self, moments: RunningMoments | None = None):
        """Take the moments of a run; without them the object tells its bytes alone."""
        self.moments = moments

    def normalized(self, layers: Sequence[Tensor], first: int = 0) -> list[Tensor]:
        return [self.moments.standardised(rows.float(), number) for number, rows in enumerate(layers, first)]

    def extra_bytes(self, size: LossSize) -> int:
        """Count the standardised targets as well."""
        return super().extra_bytes(size) + 4 * size.targets * size.dim * (size.layers + size.averaged)

    def update(self, finite: Tensor) -> None:
        self.moments.update(finite)


NORMALIZATIONS = {  # by loss.normalize
    "layer": LayerNormalization(),
    "none": NoNormalization(),
    "batch": BatchNormalization(),
    "running": RunningNormalization(),
    "dyntanh": NoNormalization(),  # the encoder's last norm has bounded them
}


def standardised_layers(layers: list[list[Tensor]]) -> list[list[Tensor]]:
    """Return the pieces (U, D) of each layer with every feature at mean 0 and variance 1 over all rows of the layer's pieces of
    all ranks, without affine, eps 1e-5. Every rank must take part.

    Layers have equal rows and widths, so that two exchanges serve all of them: of sums, with the rows, and of squares.
    Each is a mean over ranks, and so a quotient of two is that of the totals.
    """
    rows = layers[0][0].new_full(layers[0][0].shape[1:], sum(map(len, layers[0])))  # (D,), all equal
    *sums, rows = mean_over_ranks(torch.stack([*map(_sum_of_rows, layers), rows]))
    centred = [[piece - total / rows for piece in pieces] for pieces, total in zip(layers, sums, strict=True)]
    squares = mean_over_ranks(torch.stack([_sum_of_rows([piece.square() for piece in pieces]) for pieces in centred]))
    scales = torch.rsqrt(squares / rows + 1e-5)  # (L, D)
    return [[piece * scale for piece in pieces] for pieces, scale in zip(centred, scales, strict=True)]


def _sum_of_rows(pieces: list[Tensor]) -> Tensor:
    return sum(piece.sum(dim=0) for piece in pieces)
