"""The plain engine: torch's AdamW on one process, or on several with DistributedDataParallel."""

from inspect import signature

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from fastjepa.engine.adamw import apply_schedule, build_adamw
from fastjepa.engine.schedule import StepSettings
from fastjepa.masks.packed import Blocks, Packed
from fastjepa.model.jepa import Jepa

# Torch 2.14 renamed the option.
SYNC_BUFFERS = max({"forward_sync_buffers", "broadcast_buffers"} & signature(DistributedDataParallel).parameters.keys())


class PlainEngine:
    """Accumulates `micro_batches` gradients between steps; ranks exchange them during the last backward only.

    With `static_gradients` a gradient stays where it is in memory and is zeroed after a step, as a CUDA graph needs it.
    """

    def __init__(self, jepa: Jepa, world: int = 1, micro_batches: int = 1, static_gradients: bool = False,
                 pred_lr_scale: float = 1.0):  # fmt: skip
        self.jepa, self.micro_batches, self.static_gradients = jepa, micro_batches, static_gradients
        self.optimizer = build_adamw(jepa.encoder, jepa.predictor, pred_lr_scale)
        self.parameters = list(jepa.parameters())
        fixed = {SYNC_BUFFERS: False}  # positions: no forward needs to exchange them
        self.network = jepa if world == 1 else DistributedDataParallel(jepa, gradient_as_bucket_view=True, **fixed)
        self._count(0)

    def __call__(self, images: Tensor, context: Packed, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """As Jepa.forward."""
        return self.network(images, context, blocks)

    @torch.no_grad()
    def features(self, images: Tensor, context: Packed, blocks: Blocks) -> Tensor:
        """(T, D) context features alone, without gradient."""
        return self.jepa.encoder(images, context)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self._count(self.seen + 1)

    def _count(self, seen: int) -> None:
        """The micro-batches seen; outside the forward, which is thereby the same function every time, to a compiler too."""
        self.seen = seen
        self.network.require_backward_grad_sync = seen + 1 == self.micro_batches

    def step(self, now: StepSettings) -> Tensor:
        """Step the optimizer with this step's schedule values, unless a gradient is not finite.

        Returns a 0-dim bool tensor on the device: whether the step was taken. A step that was not taken changed no
        weight, no moment and no step count.
        """
        finite = torch.isfinite(get_total_norm([p.grad for p in self.parameters], foreach=True))
        apply_schedule(self.optimizer, now)
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.static_gradients)
        self._count(0)
        return finite
