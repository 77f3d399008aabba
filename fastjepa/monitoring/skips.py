"""Counting steps whose gradients were not finite, without waiting for the device."""

from collections import deque

import torch
from torch import Tensor


class Skips:
    """Counts of non-finite steps, kept on the device and read back without waiting for it.

    On CUDA `poll` answers LAG steps late, by when the copy has long arrived: always the same number of steps, so that
    ranks that counted alike also decide alike.
    """

    LAG = 8

    def __init__(self, device: torch.device, total: int = 0, in_row: int = 0, step: int = 0):
        self._asynchronous = device.type == "cuda"
        self._arrived = (total, in_row, step)
        self._counts = torch.tensor(self._arrived, dtype=torch.int64, device=device)
        self._copies: deque[tuple[Tensor, torch.cuda.Event]] = deque()  # under way, oldest first

    def update(self, finite: Tensor) -> None:
        """Count one step; `finite` is a 0-dim bool tensor on the device, which is never read by the host here."""
        bad = finite.logical_not().to(torch.int64)
        total, in_row, step = self._counts.unbind()
        total += bad
        in_row.add_(bad).mul_(bad)
        step += 1
        if self._asynchronous:
            host, event = torch.empty(3, dtype=torch.int64, pin_memory=self._counts.is_cuda), torch.cuda.Event()
            host.copy_(self._counts, non_blocking=True)
            event.record()
            self._copies.append((host, event))

    def poll(self) -> tuple[int, int, int]:
        """Return (skipped in all, skipped in a row, steps): now on a CPU, LAG steps ago on CUDA."""
        if not self._asynchronous:
            return self.sync()
        while len(self._copies) > self.LAG:
            host, event = self._copies.popleft()
            event.synchronize()
            self._arrived = tuple(host.tolist())
        return self._arrived

    def sync(self) -> tuple[int, int, int]:
        """Return the exact counts; wait for the device."""
        return tuple(self._counts.tolist())
