"""The run: `deepspeed|torchrun|python fastjepa/train.py --config C`, or `fastjepa train --config C`."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python put this directory first, where its short names would shadow anyone's modules.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.argv.insert(1, "train")
    sys.exit(runpy.run_module("fastjepa.cli", run_name="__main__", alter_sys=True))

import signal
import sys
from pathlib import Path

from fastjepa.checkpoint.directory import latest_checkpoint
from fastjepa.checkpoint.save import save_checkpoint
from fastjepa.checkpoint.state import TrainState
from fastjepa.config.schema import Config
from fastjepa.engine.schedule import Schedule
from fastjepa.errors import RunError
from fastjepa.loader.loader import Loader
from fastjepa.monitoring.lines import open_run_log, report_step, watch_collapse
from fastjepa.monitoring.log import Log
from fastjepa.monitoring.monitor import Monitor
from fastjepa.monitoring.skips import Skips
from fastjepa.ranks.collectives import union_of_names
from fastjepa.ranks.heartbeat import Heartbeat
from fastjepa.ranks.world import World, leave_world
from fastjepa.run.build import build_regularizer, build_run
from fastjepa.run.step import micro_step, take_step
from fastjepa.run.stop import Stop


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
    run = build_run(config, output, resume, init, deepspeed_config)
    config, world, engine, average, state = run.config, run.world, run.engine, run.average, run.state
    images = config.data.batch_size * world.size
    schedule = Schedule(config.optimization, len(run.source) // images)
    last = min(schedule.total_steps, max_steps or schedule.total_steps)
    skips = Skips(world.device, state.skipped, state.skipped_in_row, state.step)
    spread = build_regularizer(config, world)
    micro = micro_step(engine, average, config, world.size, spread)
    every = config.logging.checkpoint_every or schedule.steps_per_epoch

    with (
        Loader(config, run.source, world, state.step, max(last, state.step)) as loader,
        open_run_log(config, output, schedule, state, world) as log,
        Stop() as stop,
        Heartbeat(world, config.runtime.timeout, state.step) as heart,
    ):
        monitor = Monitor(config, run.source, average.target_encoder, schedule, log.kept, log.flops_per_image)
        loader.bad.update(state.bad_files)
        for note in run.notes:
            log.message(note)
        while state.step < last and not stop.agreed():
            now = schedule(state.step)
            taken = take_step(engine, average, heart.batches(loader.micro_batches(state.step)), now, config, spread, micro)
            skips.update(taken.finite)
            state.step += 1
            heart.finished(state.step)
            watch_collapse(log, monitor, state.step, taken, now)
            report_step(log, state.step, taken, now, skips, spread, micro, schedule, images)
            if skips.poll()[1] >= config.runtime.max_skipped:
                raise RunError(too_many_skips(state.step, config, output))
            if state.step % every == 0 and state.step < last:
                save_run(state, output, config, world, loader, skips, log)
        saved = save_run(state, output, config, world, loader, skips, log)
        log.message(farewell(state.step, schedule.total_steps, stop.received, saved))
    leave_world()
    return saved


def save_run(state: TrainState, output: Path, config: Config, world: World, loader: Loader, skips: Skips,
         log: Log) -> Path:  # fmt: skip
    """Write a checkpoint; every rank takes part."""
    state.skipped, state.skipped_in_row, _ = skips.sync()
    state.bad_files = union_of_names(loader.bad)
    root, tag = output / "checkpoints", config.logging.write_tag
    with log.pause():
        return save_checkpoint(root, state, tag, config.logging.keep_last)


def too_many_skips(at: int, config: Config, output: Path) -> str:
    good = latest_checkpoint(output / "checkpoints", config.logging.write_tag)
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
