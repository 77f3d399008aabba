"""The distance between the encoder and its average, in units of one update."""

import math
from collections.abc import Callable, Iterable
from itertools import count

import torch
from torch import Tensor

from fastjepa.engine.average import Average, FollowedAverage, ShardedAverage
from fastjepa.ranks.collectives import mean_over_ranks

SAMPLED_ELEMENTS = 2**20  # of the encoder, at most but for rounding: 4 MiB are kept from one step to the next


class EmaDistance:
    """The distance ||w - average|| / ||w - w before|| over the encoder's weights w, before and after one step.

    With a momentum m it is at most m / (1 - m), where updates are all alike: 99 with 0.99. Of large encoders it is that of
    every k-th element of each weight, the same ones however ranks share them.

    Args:
        due: whether the distance after so many steps is wanted, the same on every rank.
    """

    def __init__(self, average: Average | FollowedAverage | ShardedAverage, due: Callable[[int], bool]):
        parameters = list(average.target_encoder.parameters())
        every, self.device, self.due = sample_stride([p.shape for p in parameters]), parameters[0].device, due
        chosen = [(pair, slice(-pair.start % every, None, every)) for pair in average.pairs()]
        self.online = [pair.online[elements] for pair, elements in chosen]  # views
        self.average = [pair.average[elements] for pair, elements in chosen]
        self.none = torch.empty(0, device=self.online[0].device if self.online else self.device)
        self.before: Tensor | None = None  # (n,) this rank's sample of the weights, where the next step is due

    def keep(self, step: int) -> None:
        """Keep the weights that `step` steps have led to, where the distance after the next one is wanted."""
        self.before = self._sample(self.online) if self.due(step + 1) else None

    def after(self, step: int) -> Tensor | None:
        """Return the squares (2,) of ||w - average|| and ||w - w before||, both over the same number, after `step` steps; None
        where nothing is due.

        Every rank takes part. The host waits for no device, but for what gloo exchanges.
        """
        squares = None
        if self.due(step):
            now, average = self._sample(self.online), self._sample(self.average)
            apart = torch.stack([(now - other).square().sum() for other in (average, self.before)])
            squares = mean_over_ranks(apart.to(self.device))
        self.keep(step)
        return squares

    def _sample(self, views: Iterable[Tensor]) -> Tensor:
        return torch.cat([self.none, *views])  # a rank may hold no weight at all


def sample_stride(shapes: Iterable[torch.Size]) -> int:
    """Return the k for which every k-th element of each weight makes about SAMPLED_ELEMENTS at most.

    It has no divisor in common with the length of a row, so that elements of all columns are among them. Example: rows of
    768 elements, of which every 62nd would do: 65 is the next number without the divisors 2 and 3.
    """
    shapes = list(shapes)
    least = max(1, math.ceil(sum(map(math.prod, shapes)) / SAMPLED_ELEMENTS))
    rows = {shape[-1] for shape in shapes if len(shape) > 1}
    return next(k for k in count(least) if all(math.gcd(k, row) == 1 for row in rows))
