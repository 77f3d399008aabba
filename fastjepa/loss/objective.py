"""The objective of a run: a variant of targets, normalisation and regularizer, chosen once from the config."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from fastjepa.config.schema import LossConfig
from fastjepa.loader.batch import Batch
from fastjepa.loss.normalizations import NORMALIZATIONS, LayerNormalization, RunningNormalization, Target
from fastjepa.loss.regularizers import NoRegularizer
from fastjepa.loss.step_targets import StepTargets
from fastjepa.loss.targets import OutputTargets, TeacherTargets, choose_targets
from fastjepa.model.moments import RunningMoments
from fastjepa.model.vit import Encoder


class Objective(NamedTuple):
    """The variant that a run trains."""

    targets: OutputTargets | TeacherTargets | StepTargets  # by loss.target, loss.target_layers and meta.teacher
    normalization: LayerNormalization  # by loss.normalize
    distance: str  # loss.kind: smooth_l1 or l2
    regularizer: NoRegularizer  # by loss.regularizer

    def surveyed(self, batches: Iterable[Batch], step: int) -> Iterable[Batch]:
        """Return the micro-batches of a step, after a look at them where a part of the objective spans all of them."""
        return self.targets.surveyed(self.regularizer.surveyed(batches, step))


def choose_objective(
    loss: LossConfig, regularizer: NoRegularizer, moments: RunningMoments | None = None, teacher: Encoder | None = None
) -> Objective:
    """Return the objective that the config asks for.

    Args:
        moments: the predictor's, for loss.normalize running.
        teacher: the encoder of meta.teacher, on the device.
    """
    normalization = RunningNormalization(moments) if loss.normalize == "running" else NORMALIZATIONS[loss.normalize]
    targets = choose_targets(loss.target, loss.target_layers)
    return Objective(TeacherTargets(targets, teacher) if teacher else targets, normalization, loss.kind, regularizer)


def over_micro_batches(objective: Objective, averaged: bool, compute: Callable[[Batch], Target]) -> Objective:
    """Return the objective whose targets are standardised over all micro-batches of a step, as StepTargets takes them."""
    targets = StepTargets(objective.targets, averaged, compute)
    return objective._replace(targets=targets, normalization=NORMALIZATIONS["none"])
