"""The run: `deepspeed|torchrun|python fastjepa/train.py --config C`, or `fastjepa train --config C`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python put this directory first, where its short names would shadow anyone's modules.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from fastjepa import cli

    sys.exit(cli.main(["train", *sys.argv[1:]]))

import signal
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastjepa import assembly, budget, checkpoint, distributed, flops, metrics, precision, targets
from fastjepa.checkpoint import TrainState
from fastjepa.config import Config, LossConfig
from fastjepa.data import Batch, Loader
from fastjepa.distributed import World
from fastjepa.ema import Average
from fastjepa.engine import Engine
from fastjepa.graphs import Graph, Learn
from fastjepa.heartbeat import Heartbeat
from fastjepa.loss import BatchRegularizer, jepa_loss, pool
from fastjepa.model import Encoder
from fastjepa.monitors import Monitor
from fastjepa.schedule import Now, Schedule


class RunError(RuntimeError):
    """A run that cannot go on; the message names the step and the last good checkpoint."""


class Taken(NamedTuple):
    """A step that was taken."""

    loss: Tensor  # 0-dim, on the device; this rank's mean
    finite: Tensor  # 0-dim bool, on the device
    target: Tensor  # (U, D) target features of the last micro-batch; those of the context where pixels are predicted
    context_tokens: float  # mean length of a context mask in the last micro-batch
    target_tokens: float  # mean length of a target block, or, with a joint predictor, of their union


def train(
    config: Config,
    output: Path,
    max_steps: int | None = None,
    resume: str = "auto",
    init: Path | None = None,
    deepspeed_config: Path | None = None,
) -> Path:
    """Pretrain until the schedule ends, `max_steps` optimizer steps have been taken in all, or a signal asks to stop.

    Args:
        output: the run directory: config, versions, metrics and checkpoints.
        resume: auto (from the latest checkpoint, if any), must, or never (earlier checkpoints are moved aside).
        init: weights to start from when nothing is resumed.
        deepspeed_config: a JSON file of what DeepSpeed shall do beyond what the config says.

    Returns:
        The run's latest checkpoint.
    """
    run = assembly.assemble(config, output, resume, init, deepspeed_config)
    config, world, engine, average, state = run.config, run.world, run.engine, run.average, run.state
    images = config.data.batch_size * world.size
    schedule = Schedule(config.optimization, len(run.source) // images)
    last = min(schedule.total_steps, max_steps or schedule.total_steps)
    skips = metrics.Skips(world.device, state.skipped, state.skipped_in_row, state.step)
    spread = assembly.batch_regularizer(config, world)
    micro = micro_step(engine, average, config, world.size, spread)
    every = config.logging.checkpoint_every or schedule.steps_per_epoch

    with (
        Loader(config, run.source, world.rank, world.size, state.step, world.device, max(last, state.step)) as loader,
        run_log(config, output, schedule, state, world) as log,
        Stop() as stop,
        Heartbeat(world, config.runtime.timeout, state.step) as heart,
    ):
        monitor = Monitor(config, run.source, average.target_encoder, schedule, log.kept, log.flops_per_image)
        loader.bad.update(state.bad_files)
        for note in run.notes:
            log.message(note)
        while state.step < last and not stop.agreed():
            now = schedule(state.step)
            taken = step(engine, average, heart.batches(loader.micro_batches(state.step)), now, config, spread, micro)
            skips.update(taken.finite)
            state.step += 1
            heart.finished(state.step)
            watch(log, monitor, state.step, taken, now)
            report(log, state.step, taken, now, skips, spread, micro, schedule, images)
            if skips.poll()[1] >= config.runtime.max_skipped:
                raise RunError(too_many_skips(state.step, config, output))
            if state.step % every == 0 and state.step < last:
                save(state, output, config, world, loader, skips, log)
        saved = save(state, output, config, world, loader, skips, log)
        log.message(farewell(state.step, schedule.total_steps, stop.received, saved))
    distributed.shutdown()
    return saved


def step(engine: Engine, average: Average, batches: Iterable[Batch], now: Now, config: Config,
         spread: BatchRegularizer | None = None, micro: Learn | None = None) -> Taken:  # fmt: skip
    """One optimizer step over its micro-batches; nothing in it waits for the device. `micro`: as from `micro_step`."""
    micro = micro or micro_step(engine, average, config, spread=spread)
    if spread:
        spread.step = now.step
        if spread.pieces > 1:
            batches = list(batches)
            spread.survey([pooled(engine, batch, config) for batch in batches])
    total = 0.0
    for batch in batches:
        loss, target = micro(batch)
        total += loss
    finite = engine.step(now)
    average.update(now.ema_momentum, finite)
    return Taken(total, finite, target, batch.context.mean_len, batch.blocks.queries.mean_len)


def micro_step(
    engine: Engine, average: Average, config: Config, ranks: int = 1, spread: BatchRegularizer | None = None
) -> Learn:
    """`learn` on a micro-batch, compiled and captured as the config asks."""
    # What an exchange of ranks divides is compiled in parts, as assembly.networks does.
    whole = config.runtime.compile and ranks == 1 and isinstance(engine, Engine)
    run = torch.compile(forward, dynamic=True) if whole else forward

    def learn(batch: Batch) -> tuple[Tensor, Tensor]:
        """Forward and backward: the loss and the features to watch, both detached."""
        with precision.autocast(config, batch.images.device):
            loss, target, context = run(engine, average.target_encoder, batch, config.loss)
        total = loss + spread(pool(context, batch.context)) if spread else loss
        engine.backward(total)
        return loss.detach(), context.detach() if config.loss.target == "pixels" else target

    if not config.runtime.cuda_graph:
        return learn
    return Graph(learn, budget.of(config, config.data.batch_size), engine.parameters, engine.micro_batches)


def forward(engine: Engine, target_encoder: Encoder, batch: Batch, how: LossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The two branches of the paper's figure and the loss between them; also (U, D) target and (T, D) context features."""
    with torch.no_grad():
        target = targets.OF[how.target](target_encoder, batch)
    prediction, context = engine(batch.images, batch.context, batch.blocks)
    return jepa_loss(prediction, target, batch.blocks, how.kind, how.normalize), target, context


def pooled(engine: Engine, batch: Batch, config: Config) -> Tensor:
    """(S, D) pooled context features of a micro-batch, without gradient."""
    with precision.autocast(config, batch.images.device):
        return pool(engine.features(batch.images, batch.context, batch.blocks), batch.context)


def run_log(config: Config, output: Path, schedule: Schedule, state: TrainState, world: World) -> metrics.Log:
    rate = metrics.gemm_flops(world.device, precision.dtype_of(config)) * world.size if world.is_main else 0.0
    return metrics.Log(output if world.is_main else None, schedule.total_steps, config.logging.every,
                       flops.of_config(config, config.data.batch_size * world.size), rate, start_step=state.step)  # fmt: skip


def watch(log: metrics.Log, monitor: Monitor, at: int, taken: Taken, now: Now) -> None:
    """Readings of the target encoder where they are due; the ranks that do not write the log go on meanwhile."""
    if log.writes and monitor.due(at):
        with log.pause():
            readings, notes = monitor.look(at, taken.target, taken.loss, now)
        log.hold(readings)
        for note in notes:
            log.message(note)


def report(log: metrics.Log, at: int, taken: Taken, now: Now, skips: metrics.Skips, spread: BatchRegularizer | None,
           micro: Learn, schedule: Schedule, images: int) -> None:  # fmt: skip
    """A line of the log where one is due; every rank takes part in the mean of the loss."""
    due = at % log.every == 0 or at == schedule.total_steps
    line = values(taken, now, skips, spread) | counts(micro) if due else {}
    log.step(at, at // schedule.steps_per_epoch, line, images)


def values(taken: Taken, now: Now, skips: metrics.Skips, spread: BatchRegularizer | None) -> dict[str, float | Tensor]:
    """A logged line, read from the device by the log."""
    line = {"loss": distributed.mean(taken.loss), "lr": now.lr, "weight_decay": now.weight_decay,
            "ema_momentum": now.ema_momentum, "context_tokens": taken.context_tokens,
            "target_tokens": taken.target_tokens, "skipped": skips.poll()[0]}  # fmt: skip
    return line | ({"regularizer": spread.value} if spread else {})


def counts(micro: Learn) -> dict[str, float]:
    """How many micro-batches of this run had a place in the CUDA graph, and how many were over the budget."""
    return {"replayed": micro.replayed, "uncaptured": micro.uncaptured} if isinstance(micro, Graph) else {}


def save(state: TrainState, output: Path, config: Config, world: World, loader: Loader, skips: metrics.Skips,
         log: metrics.Log) -> Path:  # fmt: skip
    """Write a checkpoint; every rank takes part."""
    state.skipped, state.skipped_in_row, _ = skips.sync()
    state.bad_files = distributed.union(loader.bad)
    root, tag = output / "checkpoints", config.logging.write_tag
    with log.pause():
        return checkpoint.save(root, state, tag, config.logging.keep_last)


def too_many_skips(at: int, config: Config, output: Path) -> str:
    good = checkpoint.latest(output / "checkpoints", config.logging.write_tag)
    where = f"the last good checkpoint is {good}" if good else "no checkpoint was written yet"
    return (
        f"step {at}: {config.runtime.max_skipped} steps in a row had gradients that are not finite "
        f"(runtime.max_skipped); {where}; lower optimization.lr or look at the data"
    )


def farewell(at: int, total: int, received: int | None, saved: Path) -> str:
    if received:
        return (
            f"stopped by {signal.Signals(received).name} after step {at} of {total}; run the same command to go on from {saved}"
        )
    return f"{'finished' if at >= total else 'stopped'} after step {at} of {total}; the checkpoint is {saved}"


class Stop:
    """SIGTERM and SIGINT ask for a stop after the current step; a second Ctrl-C ends the process at once.

    A launcher passes on what the terminal or SLURM has sent to every process: only a SIGINT that comes PASSED_ON seconds
    after the first is another one, and SIGTERM has SIGKILL to follow it.
    """

    PASSED_ON = 3.0

    def __enter__(self) -> "Stop":
        self.received = self._asked = None
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        now = time.monotonic()
        self.received, self._asked = self.received or number, self._asked or now
        if number == signal.SIGINT and now - self._asked > self.PASSED_ON:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)

    def agreed(self) -> bool:
        """Whether any rank was asked, so that all stop after the same step."""
        self.received = distributed.highest(self.received or 0) or None
        return self.received is not None
