"""Single steps of the trainer, on given batches."""

from collections.abc import Iterable

from fastjepa.engine.schedule import StepSettings
from fastjepa.engine.tally import StepTally
from fastjepa.loader.batch import Batch
from fastjepa.run.step import Step


def take_step(engine, average, batches: Iterable[Batch], now: StepSettings, config, *more: object) -> StepTally:
    """Take one step; `more`: the regularizer and the runs of the body, as `Step` takes them."""
    return Step(engine, average, config, *more)(batches, now)[0]
