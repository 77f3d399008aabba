"""One optimizer step outside the loop of `train`: for replays of reference trajectories, benchmarks and tests."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastjepa.engine.average import Average
from fastjepa.engine.cuda_graph import EagerRuns
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.precision import autocast_of
from fastjepa.engine.schedule import StepSettings
from fastjepa.engine.tally import StepTally
from fastjepa.loader.batch import Batch
from fastjepa.loss.jepa_loss import jepa_loss
from fastjepa.loss.objective import Objective


class Step:
    """The lines of the loop of `train`, on given micro-batches; a test holds the two against each other.

    Call it with the micro-batches of a step and the schedule's values to get its tally and whether it was taken.
    """

    def __init__(self, engine: PlainEngine, average: Average, objective: Objective, dtype: torch.dtype = torch.float32,
                 runs: EagerRuns | None = None):  # fmt: skip
        self.engine, self.average, self.objective, self.dtype = engine, average, objective, dtype
        self.runs = runs or EagerRuns()

    def __call__(self, batches: Iterable[Batch], now: StepSettings) -> tuple[StepTally, Tensor]:
        tally = self.learn(batches, now)
        finite = self.engine.step(now)
        self.average.update(now.ema_momentum, finite)
        self.objective.normalization.update(finite)
        return tally, finite

    def learn(self, batches: Iterable[Batch], now: StepSettings) -> StepTally:
        """Gather the gradients of the micro-batches of a step."""
        tally, objective = StepTally(), self.objective
        for batch in self.runs.over(objective.surveyed(batches, now.step), tally):
            with autocast_of(self.dtype, batch.images.device):
                with torch.no_grad():
                    target = objective.targets(self.average.target_encoder, batch)
                prediction, context, pooled = self.engine(batch.images, batch.context, batch.blocks)
                loss = jepa_loss(prediction, target, batch.blocks, objective.distance, objective.normalization)
            self.engine.backward(loss + objective.regularizer(pooled))
            tally.note(loss, objective.targets.watched(target, context))
        return tally
