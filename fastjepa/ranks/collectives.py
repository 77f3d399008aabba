"""Reductions and gathers over the ranks; on one process they return what they were given."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.14 renamed it
_entered = 0


def reductions_begun() -> int:
    """Return how many of this file's reductions this process has begun: how far it is in a program that all ranks share."""
    return _entered


def counted(reduction: Callable) -> Callable:
    """Count the calls of a reduction, for `reductions_begun`."""

    @wraps(reduction)
    def entering(*args: Any, **kwargs: Any) -> Any:
        global _entered
        _entered += 1
        return reduction(*args, **kwargs)

    return entering


@counted
def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


@counted
def all_gather(tensor: Tensor, into: Tensor | None = None) -> Tensor:
    """Gather (n, ...) of every rank to (world * n, ...) in rank order, without gradient; the same values on one rank.

    `into` may be where it goes to; `tensor` may then be this rank's part of it, and only the others' are written: of
    4 ranks with n = 3, rank 1 has rows 3 to 5 of 12.
    """
    return _begin_gather(tensor, into, later=False)()


@counted
def all_gather_later(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin `all_gather`, and return a function that waits for it and returns what it has gathered."""
    return _begin_gather(tensor, None, later=True)


def _begin_gather(tensor: Tensor, into: Tensor | None, later: bool) -> Callable[[], Tensor]:
    if not dist.is_initialized():
        return tensor.detach
    mine = tensor.detach().contiguous()
    everyone = mine.new_empty(dist.get_world_size() * mine.shape[0], *mine.shape[1:]) if into is None else into
    work = ALL_GATHER(everyone, mine, async_op=later)

    def gathered() -> Tensor:
        if later:
            work.wait()
        return everyone

    return gathered


@counted
def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean over ranks, as a new tensor without gradient; the same values on one rank."""
    if not dist.is_initialized():
        return tensor.detach()
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()


@counted
def max_over_ranks(number: int) -> int:
    """Return the largest of the ranks' numbers, agreed between hosts: no device is waited for."""
    if not dist.is_initialized():
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


@counted
def text_of_main(text: str) -> str:
    """Return the main rank's text, on every rank."""
    if not dist.is_initialized():
        return text
    texts = [text]
    dist.broadcast_object_list(texts, src=0)
    return texts[0]


@counted
def gather_objects(thing: Any) -> list[Any]:
    """Return every rank's picklable thing, in rank order, on every rank."""
    if not dist.is_initialized():
        return [thing]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, thing)
    return gathered


def this_rank() -> int:
    """Return the number of this rank; 0 on one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def rank_count() -> int:
    """Return how many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def union_of_names(names: set[str]) -> list[str]:
    """Return the names of all ranks together, sorted; every rank takes part."""
    return sorted(set().union(*gather_objects(names)))
