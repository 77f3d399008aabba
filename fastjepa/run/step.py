"""One optimizer step outside the loop of `train`: for replays of reference trajectories, benchmarks and tests."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastjepa.config.schema import Config
from fastjepa.engine.average import Average
from fastjepa.engine.cuda_graph import EagerRuns
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.precision import autocast_of
from fastjepa.engine.schedule import StepSettings
from fastjepa.engine.tally import StepTally
from fastjepa.loader.batch import Batch
from fastjepa.loss.jepa_loss import NORMALIZATIONS, jepa_loss
from fastjepa.loss.regularizers import NoRegularizer
from fastjepa.loss.targets import TARGETS


class Step:
    """The lines of the loop of `train`, on given micro-batches; a test holds the two against each other.

    Call it with the micro-batches of a step and the schedule's values to get its tally and whether it was taken.
    """

    def __init__(self, engine: PlainEngine, average: Average, config: Config, regularizer: NoRegularizer | None = None,
                 runs: EagerRuns | None = None):  # fmt: skip
        self.engine, self.average, self.config = engine, average, config
        self.regularizer, self.runs = regularizer or NoRegularizer(), runs or EagerRuns()
        self.targets, self.normalization = TARGETS[config.loss.target], NORMALIZATIONS[config.loss.normalize]

    def __call__(self, batches: Iterable[Batch], now: StepSettings) -> tuple[StepTally, Tensor]:
        tally = self.learn(batches, now)
        finite = self.engine.step(now)
        self.average.update(now.ema_momentum, finite)
        return tally, finite

    def learn(self, batches: Iterable[Batch], now: StepSettings) -> StepTally:
        """Gather the gradients of the micro-batches of a step."""
        tally = StepTally()
        batches = self.regularizer.surveyed(batches, now.step, self.context_features)
        for batch in self.runs.over(batches, tally):
            with autocast_of(self.config.runtime.dtype, batch.images.device):
                with torch.no_grad():
                    target = self.targets(self.average.target_encoder, batch)
                prediction, context = self.engine(batch.images, batch.context, batch.blocks)
                loss = jepa_loss(prediction, target, batch.blocks, self.config.loss.kind, self.normalization)
            self.engine.backward(loss + self.regularizer(context, batch.context))
            tally.note(loss, self.targets.watched(target, context))
        return tally

    def context_features(self, batch: Batch) -> Tensor:
        """Return the context features (T, D) of a micro-batch, without gradient."""
        with autocast_of(self.config.runtime.dtype, batch.images.device):
            return self.engine.features(batch.images, batch.context, batch.blocks)
