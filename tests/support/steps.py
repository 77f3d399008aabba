"""Single steps of the trainer, on given batches."""

from collections.abc import Iterable

from fastjepa.engine.cuda_graph import EagerRuns
from fastjepa.engine.precision import COMPUTE_DTYPES
from fastjepa.engine.schedule import StepSettings
from fastjepa.engine.tally import StepTally
from fastjepa.loader.batch import Batch
from fastjepa.loss.objective import choose_objective
from fastjepa.loss.regularizers import NoRegularizer
from fastjepa.run.step import Step


def step_of(engine, average, config, regularizer: NoRegularizer | None = None, runs: EagerRuns | None = None) -> Step:
    """Return the step of a config's objective."""
    objective = choose_objective(config.loss, regularizer or NoRegularizer(), engine.jepa.predictor.target_moments)
    dtype = "fp32" if config.runtime.dtype == "auto" else config.runtime.dtype
    return Step(engine, average, objective, COMPUTE_DTYPES[dtype], runs)


def take_step(engine, average, batches: Iterable[Batch], now: StepSettings, config, *more: object) -> StepTally:
    """Take one step; `more`: the regularizer and the runs of the body, as `step_of` takes them."""
    return step_of(engine, average, config, *more)(batches, now)[0]
