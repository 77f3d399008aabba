"""A training step of any method, in the trainer's own loop (Same) or in that of the official codes (Naive).

A method is a module with `encoder` and `predictor` (what is trained, as the optimizer groups it), `networks` (what is
compiled), `averaged` (a pair: the average and what it follows; or None), `handle` (what the official loop does with the
gradients; or None), a forward that is autocast and a `loss` that is not.
"""

import torch
import vit
from torch import Tensor, nn

from fastjepa.config.schema import Config
from fastjepa.engine.adamw import apply_schedule
from fastjepa.engine.average import Average
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.precision import autocast_of, compute_dtype
from fastjepa.engine.schedule import Schedule
from fastjepa.model.vit import choose_attention


class Same:
    """The trainer's engine, fused AdamW, schedules and average; call it with the number of a round."""

    whole = False

    def __init__(self, method: type, config: Config, device: torch.device, batches: list[tuple]):
        self.config, self.device, self.batches = config, device, batches
        self.flops = [method.flops(config, batch, self.whole) for batch in batches]
        self.method = method(config, device, self.whole)
        self.now = Schedule(config.optimization, steps_per_epoch=1000)(0)
        self.parameters = [p for p in self.method.parameters() if p.requires_grad]
        self.prepare()

    def prepare(self) -> None:
        """Attention is materialised where `runtime.attention` does so here (bf16 on a CPU), else torch's fused one."""
        if choose_attention(self.config.runtime.attention, self.device, self.dtype()) == "matmul":
            vit.materialise(self.method.networks)
        if self.config.runtime.compile:
            for network in self.method.networks:
                network.compile(dynamic=True)
        self.engine = PlainEngine(self.method)
        self.engine.parameters = self.parameters  # its own list has the frozen ones, which have no gradients
        self.average = Average(*self.method.averaged) if self.method.averaged else None

    def dtype(self) -> torch.dtype:
        return compute_dtype(self.config)

    def __call__(self, number: int) -> Tensor:
        loss = self.loss(number)
        self.engine.backward(loss)
        finite = self.engine.step(self.now)
        if self.average:
            self.average.update(self.now.ema_momentum, finite)
        return loss.detach()

    def loss(self, number: int) -> Tensor:
        with autocast_of(self.config, self.device):
            outputs = self.method(*self.batches[number % len(self.batches)])
        return self.method.loss(*outputs)


class Naive(Same):
    """As the official codes do it: attention is materialised, nothing is fused or compiled, and the host waits.

    Their gradient scalers, which bf16 does not need, and DistributedDataParallel are left out.
    """

    whole = True

    def prepare(self) -> None:
        vit.materialise(self.method.networks)
        grouped = PlainEngine(self.method).optimizer.param_groups
        groups = [{"params": group["params"], "decayed": group["decayed"], "lr_scale": 1.0} for group in grouped]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)

    def __call__(self, number: int) -> Tensor:
        loss = self.loss(number)
        loss.backward()
        if self.method.handle:
            self.method.handle(p.grad for p in self.parameters)
        apply_schedule(self.optimizer, self.now)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.method.averaged:
            follow(*self.method.averaged, self.now.ema_momentum)
        loss.item()
        return loss.detach()


@torch.no_grad()
def follow(average: nn.Module, online: nn.Module, momentum: float) -> None:
    """A Python loop with a temporary for each parameter."""
    for target, source in zip(average.parameters(), online.parameters(), strict=True):
        target.mul_(momentum).add_((1.0 - momentum) * source)
