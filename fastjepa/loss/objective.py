"""The objective of a run: a variant of targets, normalisation and regularizer, chosen once from the config."""

from typing import NamedTuple

from fastjepa.config.schema import LossConfig
from fastjepa.loss.normalizations import NORMALIZATIONS, LayerNormalization
from fastjepa.loss.regularizers import NoRegularizer
from fastjepa.loss.targets import OutputTargets, choose_targets


class Objective(NamedTuple):
    """The variant that a run trains."""

    targets: OutputTargets  # by loss.target and loss.target_layers
    normalization: LayerNormalization  # by loss.normalize
    distance: str  # loss.kind: smooth_l1 or l2
    regularizer: NoRegularizer  # by loss.regularizer


def choose_objective(loss: LossConfig, regularizer: NoRegularizer) -> Objective:
    """Return the objective that the config asks for."""
    return Objective(choose_targets(loss), NORMALIZATIONS[loss.normalize], loss.kind, regularizer)
