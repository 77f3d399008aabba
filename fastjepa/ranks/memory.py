"""The memory that a rank may hold: that of its GPU, or its part of the machine's."""

import os
import socket
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import torch

from fastjepa.ranks.collectives import gather_objects


def rank_memory_bytes(device: torch.device) -> int:
    """Return the bytes of memory of the rank that has the least, the same number on every rank; every rank takes part.

    A GPU belongs to one rank. Ranks on a CPU share the memory of their machine in equal parts.
    """
    if device.type == "cuda":
        return min(gather_objects(torch.cuda.get_device_properties(device).total_memory))
    return least_share(gather_objects((socket.gethostname(), machine_memory_bytes())))


def least_share(ranks: Iterable[tuple[str, int]]) -> int:
    """Return the smallest equal part of a machine's memory, from each rank's (machine, bytes of the machine).

    Two ranks on a machine of 64 GB and one on a machine of 24 GB have 32, 32 and 24 GB: 24 GB.
    """
    ranks = list(ranks)
    ranks_of = Counter(machine for machine, _ in ranks)
    return min(memory // ranks_of[machine] for machine, memory in ranks)


def machine_memory_bytes() -> int:
    """Return the bytes of memory that processes may use here: the machine's, or what a container or a job is limited to."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *cgroup_limits()])


def cgroup_limits(root: Path = Path("/")) -> list[int]:
    """Return the memory limits, in bytes, of this process's Linux control group and of the groups it lies in.

    A line "0::/job/step" of /proc/self/cgroup (version 2) is limited by /sys/fs/cgroup/job/step/memory.max, by job/memory.max
    and by memory.max; "7:memory:/job" (version 1) by memory/job/memory.limit_in_bytes and memory/memory.limit_in_bytes.
    """
    limits, listed = [], root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.is_file() else ():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounted, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        for above in (PurePosixPath(group), *PurePosixPath(group).parents):
            file = root / "sys/fs/cgroup" / mounted / above.relative_to("/") / name
            if file.is_file() and (text := file.read_text().strip()).isdigit():  # "max" is no limit
                limits.append(int(text))
    return limits
