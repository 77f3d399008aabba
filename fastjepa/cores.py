"""The processor cores of this process."""

import os


def usable_cores() -> int:
    """Return how many cores this process may use: those of its affinity, which schedulers and containers set."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
