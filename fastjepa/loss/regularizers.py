"""Regularizers on the pooled context features: VICReg and SIGReg over the global batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastjepa.config.schema import LossConfig
from fastjepa.errors import ConfigError
from fastjepa.masks.packed import Packed
from fastjepa.rng import SLICE_STREAM, torch_seed

RegularizerTerm = Callable[[Tensor, int], Tensor]  # (S, D) pooled features and the step -> fp32 scalar, weighted


def pool_sequences(features: Tensor, sequences: Packed) -> Tensor:
    """(T, D) -> (S, D): fp32 mean of each sequence."""
    lengths = sequences.cu_seqlens.diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=features.device), lengths, output_size=len(features))
    sums = features.new_zeros(len(lengths), features.shape[1], dtype=torch.float32).index_add(0, owner, features.float())
    return sums / lengths[:, None]


def regularizer_term(config: LossConfig, seed: int = 0) -> RegularizerTerm | None:
    """The term that the config asks for, or None.

    vicreg: variance hinge plus off-diagonal covariance (Bardes et al. 2022; with I-JEPA: C-JEPA, Mo & Tong 2024).
    sigreg: distance of 1,024 random projections to a standard Gaussian (LeJEPA, Balestriero & LeCun 2025), with lightly's
    constants; the projections are a function of (seed, step) and of the kind of device.
    """
    if config.regularizer == "none":
        return None
    try:
        return (_vicreg if config.regularizer == "vicreg" else _sigreg)(config, seed)
    except ImportError as error:
        raise ConfigError(f"loss.regularizer: {config.regularizer} needs lightly; pip install 'fastjepa[lightly]'") from error


def _vicreg(config: LossConfig, seed: int) -> RegularizerTerm:
    from lightly.loss.vicreg_loss import covariance_loss, variance_loss

    return lambda pooled, step: (
        config.regularizer_weight * (variance_loss(pooled) + config.covariance_weight * covariance_loss(pooled))
    )


def _sigreg(config: LossConfig, seed: int) -> RegularizerTerm:
    from lightly.loss.lejepa_loss import SIGReg

    sigreg = SIGReg()

    def term(pooled: Tensor, step: int) -> Tensor:
        """Its N: the statistic is a sum over the batch, as in the paper's listing."""
        with torch.random.fork_rng([pooled.device] if pooled.is_cuda else []):  # it draws from the device's generator
            torch.manual_seed(torch_seed(seed, SLICE_STREAM, step))
            return config.regularizer_weight * sigreg.to(pooled.device)(pooled)

    return term


class BatchRegularizer:
    """The regularizer over the step's global batch, whatever the ranks and micro-batches.

    Every piece of the batch computes the term on all pooled features, its own with gradient and the others' without:
    the gradients of the pieces then add up to that of the whole.
    """

    def __init__(
        self, term: RegularizerTerm, pieces: int, gather: Callable[[Tensor], Tensor], rank: int, world: int
    ):  # fmt: skip
        self.term, self.pieces, self.gather, self.rank, self.world = term, pieces, gather, rank, world
        self.pooled, self.piece = None, 0
        self.step = 0  # set by who takes steps
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
        value = self.term(everyone, self.step)
        self.value = value.detach()
        return self.world * value
