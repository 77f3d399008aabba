"""Regularizers on the pooled context features: VICReg, SIGReg and VISReg over the global batch."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastjepa.errors import UserError
from fastjepa.loader.batch import Batch
from fastjepa.ranks.collectives import all_gather
from fastjepa.ranks.world import World
from fastjepa.rng import SLICE_STREAM, torch_seed

VISREG_SLICES = 4096  # lightly's default

RegularizerTerm = Callable[[Tensor, int], Tensor]  # (S, D) pooled features and the step -> fp32 scalar, weighted


def regularizer_term(
    name: str, weight: float, covariance_weight: float, seed: int = 0, device: torch.device | str = "cpu"
) -> RegularizerTerm | None:
    """Return the term of that name on the device of the features, as `loss.regularizer` has it, or None; the other arguments
    are the keys of the config.

    vicreg: variance hinge plus off-diagonal covariance (Bardes et al. 2022; with I-JEPA: C-JEPA, Mo & Tong 2024), with
    the authors' constants.
    sigreg: distance of 1,024 random projections to a standard Gaussian (LeJEPA, Balestriero & LeCun 2025), with lightly's
    constants; the projections are a function of (seed, step) and of the kind of device.
    visreg: squared distances of deviations from 1 and of means from 0, and the sliced Wasserstein distance of what is left to
    a Gaussian (VISReg, Wu et al. 2026), with lightly's terms and 4,096 projections, drawn as those of sigreg.
    """
    if name == "none":
        return None
    if name == "vicreg":
        return _vicreg(weight, covariance_weight)
    return _sigreg(weight, seed, device) if name == "sigreg" else _visreg(weight, seed)


def variance_hinge(x: Tensor) -> Tensor:
    """Return how far the deviations of the channels of (S, D) are below 1, the mean over channels."""
    return (1.0 - (x.var(dim=0) + 1e-4).sqrt()).relu().mean()


def covariance_penalty(x: Tensor) -> Tensor:
    """Return the squared covariances of different channels of (S, D), summed and divided by D.

    The diagonal is overwritten with zeros, not left out by an index of booleans: the host would wait to count them.
    """
    x = x - x.mean(dim=0)
    covariance = torch.einsum("bc,bd->cd", x, x) / (x.shape[0] - 1)  # (D, D)
    return covariance.square().fill_diagonal_(0).sum() / x.shape[1]


def _vicreg(weight: float, share: float) -> RegularizerTerm:
    return lambda pooled, step: weight * (variance_hinge(pooled) + share * covariance_penalty(pooled))


def _sigreg(weight: float, seed: int, device: torch.device | str) -> RegularizerTerm:
    sigreg = lightly_losses("sigreg")[0].SIGReg().to(device)  # its constants are copied now: in a step the host would wait

    def term(pooled: Tensor, step: int) -> Tensor:
        """Return N times the statistic: a sum over the batch, as in the paper's listing."""
        with slices_of(seed, step, pooled):
            return weight * sigreg(pooled)

    return term


def _visreg(weight: float, seed: int) -> RegularizerTerm:
    visreg = lightly_losses("visreg")[1]

    def term(pooled: Tensor, step: int) -> Tensor:
        """Return the three parts with equal weights, the authors' setting."""
        with slices_of(seed, step, pooled):
            shape = visreg.visreg_shape_loss(pooled, VISREG_SLICES)
        return weight * (visreg.visreg_scale_loss(pooled) + shape + visreg.visreg_center_loss(pooled))

    return term


def lightly_losses(name: str) -> tuple:
    """Return the modules lightly.loss.lejepa_loss and visreg_loss; UserError where lightly is not installed."""
    try:
        from lightly.loss import lejepa_loss, visreg_loss
    except ImportError as error:
        needs = f"loss.regularizer: {name} needs lightly"
        raise UserError(f"{needs}; pip install 'fastjepa[lightly]', or set vicreg") from error
    return lejepa_loss, visreg_loss


@contextmanager
def slices_of(seed: int, step: int, pooled: Tensor) -> Iterator[None]:
    """Draw the directions inside as a function of (seed, step): lightly draws from the device's generator."""
    with torch.random.fork_rng([pooled.device] if pooled.is_cuda else []):
        torch.manual_seed(torch_seed(seed, SLICE_STREAM, step))
        yield


class NoRegularizer:
    """No term: what stands in the loop where `loss.regularizer` is none."""

    def surveyed(self, batches: Iterable[Batch], step: int) -> Iterable[Batch]:
        """Return the micro-batches of a step, after a look at them where the term spans all of them."""
        return batches

    def __call__(self, pooled: Tensor | None) -> Tensor | float:
        """Return the term on the pooled features (S, D) of the next micro-batch, scaled for a mean over ranks."""
        return 0.0

    def logged(self) -> dict[str, Tensor]:
        """Return what a line of the log holds of it."""
        return {}


class BatchRegularizer(NoRegularizer):
    """The regularizer over the step's global batch, whatever the ranks and micro-batches.

    Every piece of the batch computes the term on all pooled features, its own with gradient and the others' without:
    the gradients of the pieces then add up to that of the whole. With two ranks of two micro-batches of 8 sequences,
    micro-batch 1 of rank 1 owns the rows 24 to 31 of the 32.
    """

    def __init__(self, term: RegularizerTerm, pieces: int, world: World, compute: Callable[[Batch], Tensor] | None = None,
                 gather: Callable[[Tensor], Tensor] = all_gather):  # fmt: skip
        """Make it for `pieces` micro-batches a step; `compute` gives the pooled features (S, D) of one, without gradient."""
        self.term, self.pieces, self.rank, self.ranks, self.gather = term, pieces, world.rank, world.size, gather
        self.compute = compute
        self.everyone, self.piece, self.step = None, 0, 0
        self.value = 0.0  # the term of the last batch, for the log

    def surveyed(self, batches: Iterable[Batch], step: int) -> Iterable[Batch]:
        self.step = step
        if self.pieces > 1:  # a first pass, without gradient, over all of this rank's micro-batches
            batches = list(batches)
            self.survey([self.compute(batch) for batch in batches])
        return batches

    def survey(self, pooled: list[Tensor]) -> None:
        """Gather the (S, D) pooled features, without gradient, of all of this rank's micro-batches from every rank."""
        self.everyone, self.piece = self.gather(torch.cat(pooled)), 0

    def __call__(self, pooled: Tensor) -> Tensor:
        if self.pieces == 1:
            self.survey([pooled.detach()])
        start = (self.rank * self.pieces + self.piece) * len(pooled)
        self.piece += 1
        whole = torch.cat((self.everyone[:start], pooled, self.everyone[start + len(pooled) :]))
        value = self.term(whole, self.step)
        self.value = value.detach()
        return self.ranks * value

    def logged(self) -> dict[str, Tensor]:
        return {"regularizer": self.value}
