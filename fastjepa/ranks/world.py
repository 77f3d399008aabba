"""The ranks of a run and their devices; one process alone never makes a process group."""

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from fastjepa.errors import ConfigError, UserError
from fastjepa.ranks.meet import meet_ranks

# Variables that say how many tasks were started, the more exact first: a step of SLURM may have fewer than its job.
TASK_COUNTS = (
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NTASKS",
    "SLURM_NPROCS",
)


@dataclass(frozen=True)
class World:
    """The place of this process: `rank` of `size` in all, `local_rank` on its machine, and its device."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Return whether this rank writes checkpoints, metrics and the console."""
        return self.rank == 0


def join_world(device: Literal["auto", "cpu", "cuda"] = "auto", timeout: float = 1800.0) -> World:
    """Join the processes that torchrun or deepspeed started; without a launcher, be the only one.

    Reads RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT and sets none of them. Several processes
    talk through NCCL on CUDA and gloo on a CPU; `timeout` is in seconds, for joining and for each reduction.

    Raises:
        ConfigError: a device that is not there.
        UserError: an incomplete environment, a rank without a GPU, or ranks that did not all arrive.
    """
    world = _number("WORLD_SIZE", 1)
    rank, local_rank = (_number("RANK"), _number("LOCAL_RANK")) if world > 1 else (0, 0)
    if not 0 <= rank < world:
        raise UserError(f"RANK={rank} must be in 0..{world - 1} (WORLD_SIZE={world}); start the run with torchrun or deepspeed")
    place = World(rank, local_rank, world, _device(device, local_rank))
    if world > 1 and not dist.is_initialized():
        _join(place, timeout)
    return place


_store: dist.Store | None = None  # of the ranks that were started together


def leave_world() -> None:
    """Leave the process group, where there is one, together: what a rank closes, a slower one may still be reading from."""
    if dist.is_initialized():
        wait_for_ranks(60.0)
        dist.destroy_process_group()


def wait_for_ranks(seconds: float = 5.0) -> None:
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


def check_launch() -> None:
    """Raise UserError where SLURM or MPI has started several tasks, of which each would train alone, the same as the others."""
    counts = [(name, os.environ[name]) for name in TASK_COUNTS if os.environ.get(name, "").isdigit()]
    if "WORLD_SIZE" not in os.environ and counts and int(counts[0][1]) > 1:
        raise UserError("{}={} without WORLD_SIZE: each of these tasks would train alone; start one task a machine and "
                        "torchrun in it (docs/multi-gpu.md), or set WORLD_SIZE=1 for a run of one process"
                        .format(*counts[0]))  # fmt: skip


def _device(wanted: str, local_rank: int) -> torch.device:
    """Return this rank's device; on CUDA it becomes the current one."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("runtime.device: cuda was asked for and torch finds no CUDA device; set runtime.device=cpu or auto")
    visible = torch.cuda.device_count()
    index = 0 if visible == 1 else local_rank  # a launcher that binds a GPU to each rank shows it no other
    if index >= visible:
        raise UserError(f"local rank {local_rank} has no GPU of its own ({visible} here); start fewer ranks")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _refuse_shared_gpu(store: dist.Store, place: World) -> None:
    """Raise UserError where two ranks have one GPU, as where a single one is visible and it is not bound to one of them.

    Example: local ranks 0 and 1 each see one device, cuda:0; its UUID says whether it is the same.
    """
    store.set(f"gpu/{place.rank}", str(torch.cuda.get_device_properties(place.device).uuid))
    gpus = store.multi_get([f"gpu/{rank}" for rank in range(place.size)])
    sharing = [rank for rank, gpu in enumerate(gpus) if gpu == gpus[place.rank]]
    if len(sharing) > 1:
        among = " and ".join(map(str, sharing))
        raise UserError(f"local rank {place.local_rank} has no GPU of its own: ranks {among} share one; start fewer ranks")


def group_backends(device: torch.device) -> dict[str, Any]:
    """Return the arguments that let a process group reduce tensors of the device, and on CUDA those of the host too."""
    if device.type == "cuda":
        return {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    return {"backend": "gloo"}


def _join(place: World, timeout: float) -> None:
    """Meet the other ranks and make the process group."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE={place.size} without {' and '.join(missing)}; start the run with torchrun or deepspeed")
    global _store
    try:
        _store = meet_ranks(place.rank, place.size, timeout)
        if place.device.type == "cuda":
            _refuse_shared_gpu(_store, place)
        dist.init_process_group(
            store=_store,
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=timeout),
            **group_backends(place.device),
        )
    except RuntimeError as error:  # DistError from the store, any from the backend, which connects the ranks to each other
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"{address}: the port is in use; set MASTER_PORT to a free one, or on one machine use torchrun --standalone"
            ) from error
        raise UserError(
            f"rank {place.rank} of {place.size} could not meet the others at {address} within {timeout:g} s; "
            f"check that every rank was started and can reach that address [{' '.join(str(error).split())[:160]}]"
        ) from error


def _number(name: str, default: int | None = None) -> int:
    """Return a whole number from the environment."""
    text = os.environ.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError):
        found = "is not set" if text is None else f"is {text!r}, not a whole number"
        raise UserError(f"{name} {found}; start the run with torchrun or deepspeed, or unset WORLD_SIZE") from None
