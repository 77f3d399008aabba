"""The engine runs the trained pair: forward, backward, step. This is the plain torch one: one process, or DDP."""

from inspect import signature

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from fastjepa import optim
from fastjepa.model import Jepa
from fastjepa.packing import Blocks, Packed
from fastjepa.schedule import Now

# Torch 2.14 renamed the option.
SYNC_BUFFERS = max({"forward_sync_buffers", "broadcast_buffers"} & signature(DistributedDataParallel).parameters.keys())


class Engine:
    """Accumulates `micro_batches` gradients between steps; ranks exchange them during the last backward only."""

    def __init__(self, jepa: Jepa, world: int = 1, micro_batches: int = 1):
        self.jepa, self.micro_batches, self.seen = jepa, micro_batches, 0
        self.optimizer = optim.adamw(jepa.encoder, jepa.predictor)
        self.parameters = list(jepa.parameters())
        fixed = {SYNC_BUFFERS: False}  # positions: no forward needs to exchange them
        self.network = jepa if world == 1 else DistributedDataParallel(jepa, gradient_as_bucket_view=True, **fixed)

    def __call__(self, images: Tensor, context: Packed, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """As Jepa.forward."""
        self.seen += 1
        self.network.require_backward_grad_sync = self.seen == self.micro_batches
        return self.network(images, context, blocks)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, now: Now) -> Tensor:
        """Step the optimizer with this step's schedule values, unless a gradient is not finite.

        Returns a 0-dim bool tensor on the device: whether the step was taken. A step that was not taken changed no
        weight, no moment and no step count.
        """
        finite = torch.isfinite(get_total_norm([p.grad for p in self.parameters], foreach=True))
        optim.apply_schedule(self.optimizer, now)
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seen = 0
        return finite
