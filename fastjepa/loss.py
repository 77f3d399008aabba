"""The I-JEPA loss (paper, equation 1) and the optional regularizer of the small presets."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastjepa.config import ConfigError, LossConfig
from fastjepa.packing import Blocks, Packed
from fastjepa_kernels import target_loss


def jepa_loss(prediction: Tensor, target: Tensor, blocks: Blocks, kind: str = "smooth_l1") -> Tensor:
    """Mean over images of the mean over (context mask, target block) of the mean distance to the target.

    Args:
        prediction: (Q, D) predictor output, any float dtype; computed on in fp32.
        target: (U, D) target encoder output of the rows that are wanted; layer-normalised here, without affine.
        blocks: says which target row each prediction is of, and its weight.
        kind: smooth_l1 (beta 1, the official code) or l2 (the paper).

    Returns:
        fp32 scalar.
    """
    return target_loss(prediction, target, blocks.target_rows, blocks.weight, kind)


def pool(features: Tensor, sequences: Packed) -> Tensor:
    """(T, D) -> (S, D): fp32 mean of each sequence."""
    lengths = sequences.cu_seqlens.diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=features.device), lengths, output_size=len(features))
    sums = features.new_zeros(len(lengths), features.shape[1], dtype=torch.float32).index_add(0, owner, features.float())
    return sums / lengths[:, None]


def regularizer(config: LossConfig) -> Callable[[Tensor], Tensor] | None:
    """(S, D) pooled features -> fp32 scalar, weighted; None where the config asks for none.

    Variance hinge plus off-diagonal covariance (VICReg, Bardes et al. 2022; with I-JEPA: C-JEPA, Mo & Tong 2024).
    """
    if config.regularizer == "none":
        return None
    try:
        from lightly.loss.vicreg_loss import covariance_loss, variance_loss
    except ImportError as error:
        raise ConfigError("loss.regularizer: vicreg needs lightly; pip install 'fastjepa[lightly]'") from error
    return lambda pooled: (
        config.regularizer_weight * (variance_loss(pooled) + config.covariance_weight * covariance_loss(pooled))
    )


class BatchRegularizer:
    """The regularizer over the step's global batch, whatever the ranks and micro-batches.

    Every piece of the batch computes the term on all pooled features, its own with gradient and the others' without:
    the gradients of the pieces then add up to that of the whole.
    """

    def __init__(
        self, term: Callable[[Tensor], Tensor], pieces: int, gather: Callable[[Tensor], Tensor], rank: int, world: int
    ):
        self.term, self.pieces, self.gather, self.rank, self.world = term, pieces, gather, rank, world
        self.pooled, self.piece = None, 0
        self.value = 0.0  # the term of the last batch, for the log

    def survey(self, pooled: list[Tensor]) -> None:
        """Take the (S, D) pooled features of all of this rank's micro-batches, computed without gradient."""
        self.pooled, self.piece = self.gather(torch.cat(pooled)), 0

    def __call__(self, pooled: Tensor) -> Tensor:
        """pooled: (S, D) of the next micro-batch, with gradient -> fp32 scalar, scaled for a mean over ranks."""
        if self.pieces == 1:
            self.survey([pooled.detach()])
        start = (self.rank * self.pieces + self.piece) * len(pooled)
        self.piece += 1
        everyone = torch.cat((self.pooled[:start], pooled, self.pooled[start + len(pooled) :]))
        value = self.term(everyone)
        self.value = value.detach()
        return self.world * value
