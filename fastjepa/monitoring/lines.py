"""The lines of a run's log: opened, filled and written from the loop."""

from pathlib import Path

from torch import Tensor

from fastjepa.checkpoint.state import TrainState
from fastjepa.config.schema import Config
from fastjepa.engine.cuda_graph import CudaGraph, MicroStep
from fastjepa.engine.precision import compute_dtype
from fastjepa.engine.schedule import Schedule, StepSettings
from fastjepa.loss.regularizers import BatchRegularizer
from fastjepa.monitoring.log import Log
from fastjepa.monitoring.machine import gemm_rate
from fastjepa.monitoring.monitor import Monitor
from fastjepa.monitoring.skips import Skips
from fastjepa.plan.flops import flops_per_image
from fastjepa.ranks.collectives import mean_over_ranks
from fastjepa.ranks.world import World
from fastjepa.run.step import TakenStep


def open_run_log(config: Config, output: Path, schedule: Schedule, state: TrainState, world: World) -> Log:
    rate = gemm_rate(world.device, compute_dtype(config)) * world.size if world.is_main else 0.0
    return Log(output if world.is_main else None, schedule.total_steps, config.logging.every,
                       flops_per_image(config, config.data.batch_size * world.size), rate, start_step=state.step)  # fmt: skip


def watch_collapse(log: Log, monitor: Monitor, at: int, taken: TakenStep, now: StepSettings) -> None:
    """Readings of the target encoder where they are due; the ranks that do not write the log go on meanwhile."""
    if log.writes and monitor.due(at):
        with log.pause():
            readings, notes = monitor.look(at, taken.target, taken.loss, now)
        log.hold(readings)
        for note in notes:
            log.message(note)


def report_step(log: Log, at: int, taken: TakenStep, now: StepSettings, skips: Skips, spread: BatchRegularizer | None,
           micro: MicroStep, schedule: Schedule, images: int) -> None:  # fmt: skip
    """A line of the log where one is due; every rank takes part in the mean of the loss."""
    due = at % log.every == 0 or at == schedule.total_steps
    line = logged_values(taken, now, skips, spread) | graph_counts(micro) if due else {}
    log.step(at, at // schedule.steps_per_epoch, line, images)


def logged_values(
    taken: TakenStep, now: StepSettings, skips: Skips, spread: BatchRegularizer | None
) -> dict[str, float | Tensor]:
    """A logged line, read from the device by the log."""
    line = {"loss": mean_over_ranks(taken.loss), "lr": now.lr, "weight_decay": now.weight_decay,
            "ema_momentum": now.ema_momentum, "context_tokens": taken.context_tokens,
            "target_tokens": taken.target_tokens, "skipped": skips.poll()[0]}  # fmt: skip
    return line | ({"regularizer": spread.value} if spread else {})


def graph_counts(micro: MicroStep) -> dict[str, float]:
    """How many micro-batches of this run had a place in the CUDA graph, and how many were over the budget."""
    return {"replayed": micro.replayed, "uncaptured": micro.uncaptured} if isinstance(micro, CudaGraph) else {}
