"""The run, top to bottom: build, the loop with both branches and the loss, log, save.

Start it with `deepspeed|torchrun|python fastjepa/train.py --config C`, or with `fastjepa train --config C`.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python put this directory first, where its short names would shadow anyone's modules.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.argv.insert(1, "train")
    sys.exit(runpy.run_module("fastjepa.cli", run_name="__main__", alter_sys=True))

import signal
from functools import partial

import torch

from fastjepa.checkpoint.save import save_checkpoint
from fastjepa.config.schema import Config
from fastjepa.engine.precision import COMPUTE_DTYPES, autocast_of
from fastjepa.engine.schedule import Schedule
from fastjepa.engine.tally import StepTally
from fastjepa.errors import RunError
from fastjepa.loader.loader import Loader
from fastjepa.loss.jepa_loss import jepa_loss
from fastjepa.monitoring.monitor import Monitor, plan_probes
from fastjepa.monitoring.run_log import RunLog
from fastjepa.monitoring.skips import Skips
from fastjepa.plan.plan import workload_of
from fastjepa.ranks.collectives import union_of_names
from fastjepa.ranks.heartbeat import Heartbeat
from fastjepa.ranks.world import leave_world
from fastjepa.run.build import Run, build_run, build_runs
from fastjepa.run.resume import last_good_checkpoint, telling_where_to_go_on
from fastjepa.run.stop import Stop


def train(
    config: Config,
    output: Path,
    max_steps: int | None = None,
    resume: str = "auto",
    init: Path | None = None,
    deepspeed_config: Path | None = None,
) -> Path:
    """Pretrain until the schedule ends, `max_steps` steps are taken in all, or a signal asks to stop; return the checkpoint.

    Args:
        output: the run directory: config, versions, metrics and checkpoints.
        resume: auto (from the latest checkpoint, if any), must, or never (earlier checkpoints are moved aside).
        init: weights to start from when nothing is resumed.
        deepspeed_config: a JSON file of what DeepSpeed shall do beyond what the config says.
    """
    run = build_run(config, output, resume, init, deepspeed_config)
    config, world, source, engine, average, state, objective, notes = run
    schedule = Schedule(config.optimization, len(source) // (config.data.batch_size * world.size))
    last = min(schedule.total_steps, max_steps or schedule.total_steps)
    every = config.logging.checkpoint_every or schedule.steps_per_epoch
    skips = Skips(world.device, state.skipped, state.skipped_in_row, state.step)
    dtype, runs = COMPUTE_DTYPES[config.runtime.dtype], build_runs(config, engine)  # eager runs, or a CUDA graph of the body
    where = partial(last_good_checkpoint, output, config.logging.write_tag)
    with (
        telling_where_to_go_on(where),
        Loader(config, source, world, state.step, max(last, state.step)) as loader,
        RunLog(workload_of(config), output, world, schedule, state.step, config.logging.every) as log,
        Stop(config.runtime.timeout, where) as stop,
        Heartbeat(world, config.runtime.timeout, state.step) as heart,
    ):
        probes = plan_probes(config, source, last, log.peak.flops_per_image)
        log.begin(Monitor(config, source, average, probes, schedule.steps_per_epoch, log.kept), notes)
        loader.bad.update(state.bad_files)
        while state.step < last and not stop.agreed():
            now, tally = schedule(state.step), StepTally()  # lr, weight decay and EMA momentum: functions of the step
            batches = objective.surveyed(heart.batches(loader.micro_batches(state.step)), now.step)
            for batch in runs.over(batches, tally):  # images (b, C, H, W), packed context and target blocks
                with autocast_of(dtype, world.device):
                    with torch.no_grad():
                        target = objective.targets(average.target_encoder, batch)  # the upper branch of the paper's figure
                    prediction, context, pooled = engine(batch.images, batch.context, batch.blocks)  # the lower branch
                    loss = jepa_loss(prediction, target, batch.blocks, objective.distance, objective.normalization)
                engine.backward(loss + objective.regularizer(pooled))
                tally.note(loss, objective.targets.watched(target, context))
            finite = engine.step(now)  # on the device: a step that is not finite changes no weight, moment or average
            average.update(now.ema_momentum, finite)
            objective.normalization.update(finite)
            skips.update(finite)
            state.step += 1
            heart.finished(state.step)
            log.record(state.step, tally, now, skips, objective.regularizer.logged() | runs.logged())
            if skips.poll()[1] >= config.runtime.max_skipped:
                raise RunError(too_many_skips(state.step, config.runtime.max_skipped, where()))
            if state.step % every == 0 and state.step < last:
                save(run, output, loader, skips, log)
        saved = save(run, output, loader, skips, log)
        log.message(farewell(state.step, schedule.total_steps, stop.received, saved))
    leave_world()
    return saved


def save(run: Run, output: Path, loader: Loader, skips: Skips, log: RunLog) -> Path:
    """Write a checkpoint; every rank takes part."""
    run.state.skipped, run.state.skipped_in_row, _ = skips.sync()
    run.state.bad_files = union_of_names(loader.bad)
    with log.pause():
        return save_checkpoint(output / "checkpoints", run.state, run.config.logging.write_tag, run.config.logging.keep_last)


def too_many_skips(step: int, most: int, where: str) -> str:
    """Return the sentence for a run whose gradients were not finite for `most` steps in a row."""
    return (
        f"step {step}: {most} steps in a row had gradients that are not finite (runtime.max_skipped); {where}; "
        "lower optimization.lr or look at the data"
    )


def farewell(step: int, total: int, received: int | None, saved: Path) -> str:
    """Return the last sentence of a run, which says how to go on where a signal has stopped it."""
    if received:
        name = signal.Signals(received).name
        return f"stopped by {name} after step {step} of {total}; run the same command to go on from {saved}"
    return f"{'finished' if step >= total else 'stopped'} after step {step} of {total}; the checkpoint is {saved}"
