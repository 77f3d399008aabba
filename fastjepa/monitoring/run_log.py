"""The log of a run: its lines, its readings of collapse, and how many steps were skipped."""

from pathlib import Path

from torch import Tensor

from fastjepa.engine.precision import COMPUTE_DTYPES
from fastjepa.engine.schedule import Schedule, StepSettings
from fastjepa.engine.tally import StepTally
from fastjepa.monitoring.log import Log, Peak
from fastjepa.monitoring.machine import gemm_rate
from fastjepa.monitoring.monitor import Monitor
from fastjepa.monitoring.skips import Skips
from fastjepa.plan.flops import flops_per_image
from fastjepa.plan.workload import Workload
from fastjepa.ranks.collectives import mean_over_ranks
from fastjepa.ranks.world import World


class RunLog(Log):
    """The log of a run: the main rank writes it, and every rank takes part in the mean of the loss."""

    def __init__(self, work: Workload, output: Path, world: World, schedule: Schedule, start_step: int, every: int):
        """Begin after `start_step` steps to write a line every so many."""
        self.images, self.schedule = work.batch_size * world.size, schedule
        rate = gemm_rate(world.device, COMPUTE_DTYPES[work.dtype]) * world.size if world.is_main else 0.0
        peak = Peak(flops_per_image(work, self.images), rate)
        super().__init__(output if world.is_main else None, schedule.total_steps, every, peak, start_step)
        self.monitor = None

    def begin(self, monitor: Monitor, notes: list[str]) -> None:
        """Tell the notes, and take the monitor's readings from now on, which tell of collapse."""
        for note in notes:
            self.message(note)
        self.monitor = monitor
        monitor.distance.keep(self.start_step)

    def has_line(self, step: int) -> bool:
        """Return whether `step` gets a line: also where readings fall, so that each stands at its own step."""
        return super().has_line(step) or self.monitor.due(step)

    def record(self, step: int, tally: StepTally, now: StepSettings, skips: Skips, extras: dict[str, float | Tensor]) -> None:
        """Record that `step` steps have been taken; a line and readings are made where they are due."""
        apart = self.monitor.distance.after(step)  # every rank takes part
        if self.writes and self.monitor.due(step):  # the ranks that do not write the log go on meanwhile
            with self.pause():
                readings, notes = self.monitor.look(step, tally.features, tally.loss, now, apart)
            self.hold(readings)
            for note in notes:
                self.message(note)
        values = self._values(tally, now, skips, extras) if self.has_line(step) else {}  # every rank takes part in the mean
        self.step(step, step // self.schedule.steps_per_epoch, values, self.images)

    def _values(
        self, tally: StepTally, now: StepSettings, skips: Skips, extras: dict[str, float | Tensor]
    ) -> dict[str, float | Tensor]:
        """Return the values of a line; the log reads them from the device."""
        return {
            "loss": mean_over_ranks(tally.loss),
            "lr": now.lr,
            "weight_decay": now.weight_decay,
            "ema_momentum": now.ema_momentum,
            "context_tokens": tally.context_tokens,
            "target_tokens": tally.target_tokens,
            "skipped": skips.poll()[0],
        } | extras
