"""The I-JEPA loss (paper, equation 1) and the optional regularizers of the small presets."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa import distributed
from fastjepa.config import ConfigError, LossConfig
from fastjepa.draws import SLICES, torch_seed
from fastjepa.packing import Blocks, Packed
from fastjepa_kernels import target_loss

Term = Callable[[Tensor, int], Tensor]  # (S, D) pooled features and the step -> fp32 scalar, weighted


def jepa_loss(prediction: Tensor, target: Tensor, blocks: Blocks, kind: str = "smooth_l1", normalize: str = "layer") -> Tensor:
    """Mean over images of the mean over (context mask, target block) of the mean distance to the target.

    Args:
        prediction: (Q, D) predictor output, any float dtype; computed on in fp32.
        target: (U, D) targets as `targets` gives them.
        blocks: says which target row each prediction is of, and its weight.
        kind: smooth_l1 (beta 1, the official code) or l2 (the paper).
        normalize: layer (every target, without affine: the method), none, or batch, as `standardised`.

    Returns:
        fp32 scalar.
    """
    if normalize == "layer":
        return target_loss(prediction, target, blocks.target_rows, blocks.weight, kind)
    target = target.float() if normalize == "none" else standardised(target.float())
    distance = F.smooth_l1_loss if kind == "smooth_l1" else F.mse_loss
    rows = distance(prediction.float(), target.index_select(0, blocks.target_rows), reduction="none").mean(dim=1)
    return (rows * blocks.weight).sum()


def standardised(target: Tensor) -> Tensor:
    """(U, D) -> (U, D): every feature to mean 0 and variance 1 over the U rows of all ranks, without affine, eps 1e-5.

    Every rank must take part. The rows of a step's other micro-batches are not seen: the config refuses them.
    """
    rows = distributed.mean(target.new_full((), len(target)))  # a rank's, in the mean: sums are taken as means too
    centred = target - distributed.mean(target.sum(dim=0)) / rows
    return centred * torch.rsqrt(distributed.mean(centred.square().sum(dim=0)) / rows + 1e-5)


def pool(features: Tensor, sequences: Packed) -> Tensor:
    """(T, D) -> (S, D): fp32 mean of each sequence."""
    lengths = sequences.cu_seqlens.diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=features.device), lengths, output_size=len(features))
    sums = features.new_zeros(len(lengths), features.shape[1], dtype=torch.float32).index_add(0, owner, features.float())
    return sums / lengths[:, None]


def regularizer(config: LossConfig, seed: int = 0) -> Term | None:
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


def _vicreg(config: LossConfig, seed: int) -> Term:
    from lightly.loss.vicreg_loss import covariance_loss, variance_loss

    return lambda pooled, step: (
        config.regularizer_weight * (variance_loss(pooled) + config.covariance_weight * covariance_loss(pooled))
    )


def _sigreg(config: LossConfig, seed: int) -> Term:
    from lightly.loss.lejepa_loss import SIGReg

    sigreg = SIGReg()

    def term(pooled: Tensor, step: int) -> Tensor:
        """Its N: the statistic is a sum over the batch, as in the paper's listing."""
        with torch.random.fork_rng([pooled.device] if pooled.is_cuda else []):  # it draws from the device's generator
            torch.manual_seed(torch_seed(seed, SLICES, step))
            return config.regularizer_weight * sigreg.to(pooled.device)(pooled)

    return term


class BatchRegularizer:
    """The regularizer over the step's global batch, whatever the ranks and micro-batches.

    Every piece of the batch computes the term on all pooled features, its own with gradient and the others' without:
    the gradients of the pieces then add up to that of the whole.
    """

    def __init__(
        self, term: Term, pieces: int, gather: Callable[[Tensor], Tensor], rank: int, world: int
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
