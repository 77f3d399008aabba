"""Ranks, devices and the few reductions a run needs; one process alone never makes a process group."""

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fastjepa.config import ConfigError

GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.14 renamed it


@dataclass(frozen=True)
class World:
    """Where this process stands: `rank` of `size` in all, `local_rank` on its machine, and its device."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes checkpoints, metrics and the console."""
        return self.rank == 0


def init(device: Literal["auto", "cpu", "cuda"] = "auto", timeout: float = 1800.0) -> World:
    """Join the processes that torchrun or deepspeed started; without a launcher, be the only one.

    Reads RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT and sets none of them. Several processes
    talk through NCCL on CUDA and gloo on a CPU; `timeout` is in seconds, for joining and for each reduction.

    Raises:
        ConfigError: a device that is not there, an incomplete environment, or ranks that did not all arrive.
    """
    world = _number("WORLD_SIZE", 1)
    rank, local_rank = (_number("RANK"), _number("LOCAL_RANK")) if world > 1 else (0, 0)
    if not 0 <= rank < world:
        raise ConfigError(
            f"RANK={rank} must be in 0..{world - 1} (WORLD_SIZE={world}); start the run with torchrun or deepspeed"
        )
    place = World(rank, local_rank, world, _device(device, local_rank))
    if world > 1 and not dist.is_initialized():
        _join(place, timeout)
    return place


_store: dist.Store | None = None  # of the ranks that were started together
_entered = 0


def entered() -> int:
    """How many of this file's reductions this process has begun: how far it has come, in a program that all ranks share."""
    return _entered


def counted(reduction: Callable) -> Callable:
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


def shutdown() -> None:
    """Leave the process group, where there is one, together: what a rank closes, a slower one may still be reading from."""
    if dist.is_initialized():
        linger(60.0)
        dist.destroy_process_group()


def linger(seconds: float = 5.0) -> None:
    """Wait until every rank has come here, but no longer: a launcher ends all others with the first that has failed."""
    if _store is None or not dist.is_initialized():
        return
    until = time.monotonic() + seconds
    try:
        _store.add("lingering", 1)
        while _store.add("lingering", 0) < dist.get_world_size() and time.monotonic() < until:
            time.sleep(0.05)
    except RuntimeError:  # the rank that keeps the store has left, when all had come
        return


@counted
def all_gather(tensor: Tensor, into: Tensor | None = None) -> Tensor:
    """(n, ...) on every rank -> (world * n, ...) in rank order, without gradient; the same values on one rank.

    `into` may be where it goes to; `tensor` may then be this rank's part of it, and only the others' are written.
    """
    if not dist.is_initialized():
        return tensor.detach()
    mine = tensor.detach().contiguous()
    everyone = mine.new_empty(dist.get_world_size() * mine.shape[0], *mine.shape[1:]) if into is None else into
    GATHER(everyone, mine)
    return everyone


@counted
def mean(tensor: Tensor) -> Tensor:
    """The mean over ranks, as a new tensor without gradient; the same values on one rank."""
    if not dist.is_initialized():
        return tensor.detach()
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()


@counted
def highest(number: int) -> int:
    """The largest of the ranks' numbers, agreed between hosts: no device is waited for."""
    if not dist.is_initialized():
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


@counted
def from_main(text: str) -> str:
    """The main rank's text, on every rank."""
    if not dist.is_initialized():
        return text
    texts = [text]
    dist.broadcast_object_list(texts, src=0)
    return texts[0]


@counted
def gather(thing: Any) -> list[Any]:
    """Every rank's picklable thing, in rank order, on every rank."""
    if not dist.is_initialized():
        return [thing]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, thing)
    return gathered


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def union(names: set[str]) -> list[str]:
    """All ranks' names, sorted."""
    return sorted(set().union(*gather(names)))


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("runtime.device: cuda was asked for and torch finds no CUDA device; set runtime.device=cpu or auto")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} here); start fewer ranks"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _join(place: World, timeout: float) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE={place.size} without {' and '.join(missing)}; start the run with torchrun or deepspeed")
    cuda = place.device.type == "cuda"
    global _store
    try:
        _store = _meet(place, timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=_store,
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=timeout),
            device_id=place.device if cuda else None,
        )
    except RuntimeError as error:  # DistError from the store, any from the backend, which connects the ranks to each other
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"{address}: the port is in use; set MASTER_PORT to a free one, or on one machine use torchrun --standalone"
            ) from error
        raise ConfigError(
            f"rank {place.rank} of {place.size} could not meet the others at {address} within {timeout:g} s; "
            f"check that every rank was started and can reach that address [{' '.join(str(error).split())[:160]}]"
        ) from error


def _meet(place: World, timeout: float) -> dist.Store:
    """The launcher's store, under a name that this start's ranks share and no earlier one's.

    torchrun keeps one store through all its restarts, and a rank that read there where its peers were before would wait
    for the dead. Its count of restarts is no name: each node has its own. So every rank says that it is there, in a word
    nobody has said before, and the main rank publishes all words until each has found its own among them.
    """
    store, *_ = next(dist.rendezvous("env://", place.rank, place.size, timeout=timedelta(seconds=timeout)))
    words, mine, agreed = [f"word/{rank}" for rank in range(place.size)], uuid.uuid4().hex, ""
    store.set(words[place.rank], mine)
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if place.is_main:
            store.set("present", b" ".join(store.multi_get(words)))
        present = store.get("present").decode()
        if mine in present:
            name = uuid.uuid5(uuid.NAMESPACE_OID, present).hex
            if store.add(name, int(present != agreed)) == place.size:
                return dist.PrefixStore(name, store)
            agreed = present
        time.sleep(0.02 * max(1.0, place.size / 64))
    raise dist.DistStoreError("those who are in the store belong to an earlier start")


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError):
        found = "is not set" if text is None else f"is {text!r}, not a whole number"
        raise ConfigError(f"{name} {found}; start the run with torchrun or deepspeed, or unset WORLD_SIZE") from None
