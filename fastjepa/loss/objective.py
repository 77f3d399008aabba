"""The objective of a run: a variant of targets, normalisation and regularizer, chosen once from the config."""

from typing import NamedTuple

from fastjepa.config.schema import LossConfig
from fastjepa.loss.jepa_loss import NORMALIZATIONS, LayerNormalization
from fastjepa.loss.regularizers import NoRegularizer
from fastjepa.loss.targets import TARGETS, OutputTargets


class Objective(NamedTuple):
    """The variant that a run trains."""

    targets: OutputTargets  # by loss.target
    normalization: LayerNormalization  # by loss.normalize
    distance: str  # loss.kind: smooth_l1 or l2
    regularizer: NoRegularizer  # by loss.regularizer


def choose_objective(loss: LossConfig, regularizer: NoRegularizer) -> Objective:
    """Return the objective that the config asks for."""
    return Objective(TARGETS[loss.target], NORMALIZATIONS[loss.normalize], loss.kind, regularizer)
