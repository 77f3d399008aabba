"""The plain engine: torch's AdamW, or Muon beside it, on one process, or on several with DistributedDataParallel."""

from collections.abc import Mapping
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from fastjepa.engine.adamw import apply_schedule, build_adamw, build_adamw_ema
from fastjepa.engine.average import Average, FollowedAverage
from fastjepa.engine.muon import MuonAdamW
from fastjepa.engine.schedule import StepSettings
from fastjepa.masks.packed import Blocks, Packed
from fastjepa.model.jepa import Jepa
from fastjepa.model.vit import Encoder
from fastjepa_kernels import dispatch

# Torch 2.14 renamed the option.
SYNC_BUFFERS = max({"forward_sync_buffers", "broadcast_buffers"} & signature(DistributedDataParallel).parameters.keys())


class PlainEngine:
    """Forward, backward and step in plain torch. It gathers the gradients of `micro_batches` micro-batches between steps;
    ranks exchange them during the last backward only.

    With `static_gradients` a gradient stays where it is in memory and is zeroed after a step, as a CUDA graph needs it.
    """

    def __init__(self, jepa: Jepa, world: int = 1, micro_batches: int = 1, static_gradients: bool = False,
                 pred_lr_scale: float = 1.0, muon: bool = False):  # fmt: skip
        self.jepa, self.micro_batches, self.static_gradients = jepa, micro_batches, static_gradients
        self.pred_lr_scale, self.muon = pred_lr_scale, muon
        self.optimizer = (MuonAdamW if muon else build_adamw)(jepa.encoder, jepa.predictor, pred_lr_scale)
        self.advance = self._advance
        self.parameters = list(jepa.parameters())
        fixed = {SYNC_BUFFERS: False}  # positions: no forward needs to exchange them
        self.network = jepa if world == 1 else DistributedDataParallel(jepa, gradient_as_bucket_view=True, **fixed)
        self._count(0)

    def shards(self, average: Average, networks: Mapping[str, nn.Module]) -> None:
        """Return None: every rank has the whole state."""
        return None

    def follow(self, target_encoder: Encoder) -> Average:
        """Return the average that follows the encoder; it starts as `target_encoder`, which holds it.

        Where `runtime.kernels` takes the kernel of adamw_ema_step (by default on CUDA), AdamW and the average are one pass
        over the weights, which `step` makes. Elsewhere, and beside Muon, the average is a pass of its own.
        """
        if self.muon or not dispatch.runs_triton("adamw_ema_step", self.parameters[0]):
            return Average(target_encoder, self.jepa.encoder)
        self.optimizer = build_adamw_ema(self.jepa.encoder, self.jepa.predictor, target_encoder, self.pred_lr_scale)
        self.advance = self._advance_with_average
        return FollowedAverage(target_encoder, self.jepa.encoder)

    def __call__(self, images: Tensor, context: Packed, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return predictions (Q, D), context features (T, D) and those pooled, as Jepa.forward."""
        return self.network(images, context, blocks)

    @torch.no_grad()
    def pooled(self, images: Tensor, context: Packed, blocks: Blocks) -> Tensor:
        """Return the pooled features alone, as a regularizer reads them, without gradient."""
        return self.jepa.pooled(self.jepa.encoder(images, context), context)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients to those of the step."""
        loss.backward()
        self._count(self.seen + 1)

    def _count(self, seen: int) -> None:
        """Count the micro-batches, outside the forward, which is thereby the same function every time, to a compiler too."""
        self.seen = seen
        self.network.require_backward_grad_sync = seen + 1 == self.micro_batches

    def step(self, now: StepSettings) -> Tensor:
        """Step the optimizer with this step's schedule values, unless a gradient is not finite.

        Returns a 0-dim bool tensor on the device: whether the step was taken. A step that was not taken changed no
        weight, no moment and no step count.
        """
        finite = torch.isfinite(get_total_norm([p.grad for p in self.parameters], foreach=True))
        apply_schedule(self.optimizer, now)
        self.advance(now, finite)
        self.optimizer.zero_grad(set_to_none=not self.static_gradients)
        self._count(0)
        return finite

    def _advance(self, now: StepSettings, finite: Tensor) -> None:
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()

    def _advance_with_average(self, now: StepSettings, finite: Tensor) -> None:
        self.optimizer.step(momentum=now.ema_momentum, finite=finite)
