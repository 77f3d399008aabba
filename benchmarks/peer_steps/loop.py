"""The loop that the documentation of both libraries shows: loss, backward, AdamW, average."""

from collections.abc import Callable

import torch
from peer_process import Request
from timing import PhaseClock
from torch import Tensor, nn


class PeerStep:
    """A training step; a library's own has `optimizer`, `loss(number)` and `follow()`, which moves the average."""

    def __init__(self, request: Request):
        self.device, self.momentum = torch.device(request.device), request.rates["ema_momentum"]
        self.batches = [[torch.from_numpy(array).to(self.device) for array in batch] for batch in request.batches]
        self.precision = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=request.dtype == "bf16")

    def batch(self, number: int) -> list[Tensor]:
        return self.batches[number % len(self.batches)]

    def __call__(self, number: int, mark: Callable[[str], None] = lambda phase: None) -> Tensor:
        with self.precision():
            loss = self.loss(number)
        mark("forward")
        loss.backward()
        mark("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark("optimizer")
        self.follow()
        mark("EMA")
        return loss.detach()

    def phases(self, number: int) -> dict[str, float]:
        clock = PhaseClock(self.device)
        self(number, clock.mark)
        return clock.read()


def adamw(networks: list[nn.Module], request: Request) -> torch.optim.AdamW:
    rates = request.rates
    return torch.optim.AdamW(nn.ModuleList(networks).parameters(), rates["lr"], weight_decay=rates["weight_decay"])
