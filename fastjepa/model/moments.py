"""Moments of targets: the mean and the variance of each feature, averaged over the steps of a run."""

import torch
from torch import Tensor, nn

from fastjepa.ranks.collectives import mean_over_ranks

MOMENTUM = 0.99  # of the moments, once a step


class RunningMoments(nn.Module):
    """Mean and variance of each feature of several layers of targets; a run starts with 0 and 1.

    Rows of a step are counted as they come, micro-batch by micro-batch; they enter the moments together, with those of every
    rank, when the step is over. The first step's moments are taken whole: the average is over the steps there were.
    """

    def __init__(self, layers: int, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(layers, dim))
        self.register_buffer("variance", torch.ones(layers, dim))
        self.register_buffer("weight", torch.zeros(()))  # of all steps so far: 1 - MOMENTUM ** steps
        self.counted: dict[int, list[Tensor]] = {}  # layer -> rows, sum and squares of this step, from the mean

    def standardised(self, rows: Tensor, layer: int) -> Tensor:
        """Return the targets (U, D) of a layer by the moments so far, eps 1e-5, and count them for those to come."""
        centred = rows - self.mean[layer]
        found = [centred.new_full((1,), len(rows)), centred.sum(dim=0), centred.square().sum(dim=0)]
        before = self.counted.get(layer)
        self.counted[layer] = [a + b for a, b in zip(before, found, strict=True)] if before else found
        return centred * torch.rsqrt(self.variance[layer] + 1e-5)

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Let the step's rows enter the moments where `finite` holds and they are finite; every rank takes part.

        Example: after a first step whose mean is 2, one of mean 4 moves it by (1 - .99) / (1 - .99 ** 2) = .503 of the way.
        """
        parts = [torch.cat(self.counted[layer]) for layer in sorted(self.counted)]  # each (1 + 2 D,)
        self.counted = {}
        rows, sums, squares = mean_over_ranks(torch.stack(parts)).split((1, *2 * self.mean.shape[1:]), dim=1)
        shift = sums / rows
        weight = MOMENTUM * self.weight + (1 - MOMENTUM)
        rate, variance = (1 - MOMENTUM) / weight, squares / rows - shift.square()
        good = finite & sums.isfinite().all() & squares.isfinite().all()
        for kept, new in ((self.mean, self.mean + rate * shift), (self.variance, self.variance.lerp(variance, rate)),
                          (self.weight, weight)):  # fmt: skip
            kept.copy_(torch.where(good, new, kept))
