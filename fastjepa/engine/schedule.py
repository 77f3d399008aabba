"""Learning rate, weight decay and EMA momentum as pure functions of the step (paper, appendix A.1)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastjepa.config.schema import OptimizationConfig


@dataclass(frozen=True)
class StepSettings:
    """Values of the schedules at one step."""

    lr: float
    weight_decay: float
    ema_momentum: float
    step: int = 0
    muon_lr: float = 0.0
    muon_weight_decay: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Schedules of a run: call it with a step (0 is the first) to get its settings.

    As in the official code, learning rate and weight decay are advanced before the optimizer step, so that step 0
    already uses their value at 1, while the momentum starts at its value at 0. Where ipe_scale ends the schedules before
    the run, each stays at its last value.
    """

    optimization: OptimizationConfig
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole run."""
        return self.optimization.epochs * self.steps_per_epoch

    def __call__(self, step: int) -> StepSettings:
        o = self.optimization
        stretched = o.ipe_scale * self.total_steps
        horizon, warmup = int(stretched), int(o.warmup * self.steps_per_epoch)
        if step + 1 < warmup:
            lr = o.start_lr + (step + 1) / warmup * (o.lr - o.start_lr)
        else:
            lr = cosine_between(o.lr, o.final_lr, (step + 1 - warmup) / max(1, horizon - warmup))
        weight_decay = cosine_between(o.weight_decay, o.final_weight_decay, (step + 1) / max(1, horizon))
        momentum = between_knots(o.momentum_knots, step, stretched)
        muon_lr = o.muon_lr * lr / o.lr if o.lr else 0.0
        muon_decay = cosine_between(*o.muon_weight_decay, (step + 1) / max(1, horizon))
        return StepSettings(lr, weight_decay, momentum, step, muon_lr, muon_decay)


def warmup_notes(optimization: OptimizationConfig) -> list[str]:
    """Return a sentence for the user where the warm-up leaves no room for the learning rate to decay; else none.

    Example: 40 epochs of warm-up in a run of 3 stop at 3/40 of the way from 2e-4 to 1e-3, which is 2.6e-4.
    """
    o = optimization
    if o.warmup >= o.epochs:
        reached = o.start_lr + o.epochs / o.warmup * (o.lr - o.start_lr)
        return [f"warning: optimization.warmup: {o.warmup:g} epochs of warm-up in a run of {o.epochs}: the learning rate ends "
                f"at {reached:.3g} (optimization.lr {o.lr:g}) and never decays; lower optimization.warmup or raise "
                "optimization.epochs"]  # fmt: skip
    if o.warmup >= o.ipe_scale * o.epochs:
        return [f"warning: optimization.warmup: {o.warmup:g} epochs of warm-up, and optimization.ipe_scale {o.ipe_scale:g} "
                f"ends the schedules after {o.ipe_scale * o.epochs:.3g} of {o.epochs} epochs: the learning rate falls from "
                f"{o.lr:g} to {o.final_lr:g} in one step; lower the warm-up or raise optimization.ipe_scale"]  # fmt: skip
    return []


def between_knots(knots: Sequence[tuple[float, float]], step: int, horizon: float) -> float:
    """Go in straight lines through knots (share of `horizon` steps, value); before the first and after the last stand still.

    Example: (0.2, 0.9) and (0.4, 1.0) over 10 steps give 0.9 up to step 2, 0.95 at step 3 and 1.0 from step 4 on.
    """
    if step < knots[0][0] * horizon:
        return knots[0][1]
    for (start, low), (end, high) in itertools.pairwise(knots):
        if step < end * horizon:
            return low + (step - start * horizon) * (high - low) / ((end - start) * horizon)
    return knots[-1][1]


def cosine_between(start: float, end: float, progress: float) -> float:
    """Go from start (progress 0) to end (1) along half a cosine, and stay at end from there on."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
