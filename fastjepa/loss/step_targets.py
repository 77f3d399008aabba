"""Targets of a whole step, made and standardised before its first micro-batch, for `loss.normalize: batch`."""

from collections.abc import Callable, Iterable

from torch import Tensor

from fastjepa.loader.batch import Batch
from fastjepa.loss.normalizations import Target, standardised_layers
from fastjepa.loss.targets import OutputTargets, TeacherTargets
from fastjepa.model.vit import Encoder
from fastjepa_kernels.target_loss import layers_of


class StepTargets:
    """Targets of another object, standardised over the step: every feature over all micro-batches, of every rank.

    Example: two layers of 3 micro-batches are kept as 3 pairs; each layer is standardised over its 3 pieces. Where their
    average is predicted, 3 averages are kept.
    """

    def __init__(self, targets: OutputTargets | TeacherTargets, averaged: bool, compute: Callable[[Batch], Target]):
        """Take the targets, whether the average of their layers is predicted, and what computes those of a micro-batch."""
        self.targets, self.averaged, self.compute = targets, averaged, compute
        self.ready, self.shown = [], None

    def surveyed(self, batches: Iterable[Batch]) -> list[Batch]:
        """Return the micro-batches of a step, after a first pass over their targets."""
        batches, found = list(batches), []
        for batch in batches:
            self.shown = self.compute(batch)  # of the last, as it is: the features whose collapse is to be seen
            found.append([rows.float() for rows in layers_of(self.shown)])
        layers = standardised_layers([list(pieces) for pieces in zip(*found, strict=True)])
        if self.averaged:
            layers = standardised_layers([[sum(rows) / len(rows) for rows in zip(*layers, strict=True)]])
        self.ready = list(zip(*layers, strict=True))[::-1]
        return batches

    def __call__(self, target_encoder: Encoder, batch: Batch) -> Target:
        """Return the targets of the next micro-batch, (U, D) of each layer, or of their average."""
        return self.ready.pop()

    def watched(self, target: Target, context: Tensor) -> Tensor:
        """Return the features whose collapse is to be seen, those of the step's last micro-batch as they were."""
        return self.targets.watched(self.shown, context)
