"""Step time, the share of the average in it, and memory by ZeRO stage and ranks: `python benchmarks/step.py --zero 0,1`.

The global batch stays the same. All stages and numbers of ranks take turns, each in processes that torchrun starts.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import timing
import torch
from work import STEPS_PER_EPOCH, Work

from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import Config
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.precision import COMPUTE_DTYPES
from fastjepa.engine.schedule import Schedule
from fastjepa.engine.zero import ZeroEngine
from fastjepa.errors import UserError
from fastjepa.ranks.collectives import barrier, gather_objects
from fastjepa.ranks.world import join_world, leave_world
from fastjepa.run.build import apply_process_settings, build_engine, build_networks, build_objective, placed_teacher
from fastjepa.run.step import Step

STEPS, WARMUP = 3, 1  # of each start


def compare_stages(config: Config, stages: list[int], ranks: list[int], rounds: int) -> list[dict]:
    """Return a row for every stage and number of ranks; UserError where the batch does not divide or a start fails."""
    for count in ranks:
        if config.data.batch_size % count:
            raise UserError(f"--batch {config.data.batch_size}: must be a multiple of --ranks {count}")
    found = {(stage, count): [] for count in ranks for stage in stages}
    for _ in range(rounds):
        for case, starts in found.items():
            starts.append(start_ranks(config, *case))
    return [{"dtype": config.runtime.dtype} | stage_row(*case, starts) for case, starts in found.items()]


def start_ranks(config: Config, stage: int, ranks: int) -> dict:
    """Start all ranks once and return what rank 0 measured."""
    data = dataclasses.replace(config.data, batch_size=config.data.batch_size // ranks)
    runtime = dataclasses.replace(config.runtime, zero=stage)
    asked = json.dumps(dataclasses.replace(config, data=data, runtime=runtime).to_dict())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), __file__, asked]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"stage {stage} on {ranks} ranks failed: {cause_of_failure(done.stderr)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def cause_of_failure(stderr: str) -> str:
    """Return the error of the first rank that has one; of a rank that was killed, the words of torchrun."""
    errors = re.findall(r"^(?:\[rank\d+\]: )?\S*Error: .+", stderr, re.MULTILINE)
    causes = re.findall(r"^ +(?:rank|exitcode) +: .+", stderr.partition("Root Cause")[2], re.MULTILINE)
    return errors[0] if errors else "; ".join(" ".join(line.split()) for line in causes) or stderr[-300:]


def stage_row(stage: int, ranks: int, starts: list[dict]) -> dict:
    steps = timing.Spread.of([ms for one in starts for ms in one["ms"]])
    share = timing.Spread.of([ema / ms for one in starts for ema, ms in zip(one["ema_ms"], one["ms"], strict=True)])
    return {"zero": stage, "ranks": ranks, "ms": steps.median, "p20": steps.p20, "p80": steps.p80, "n": len(starts) * STEPS,
            "ema_share": share.median, "peak_bytes": max(one["peak_bytes"] for one in starts),
            "state_bytes": starts[0]["state_bytes"]}  # fmt: skip


class TimedAverage:
    """An average whose updates are timed, in milliseconds."""

    def __init__(self, average, device: torch.device):
        self.average, self.device, self.target_encoder, self.ms = average, device, average.target_encoder, []

    def update(self, *args) -> None:
        timing.synchronize(self.device)
        start = time.perf_counter()
        self.average.update(*args)
        timing.synchronize(self.device)
        self.ms.append(1000 * (time.perf_counter() - start))


def measure_rank(config: Config) -> dict | None:
    """Take steps on batches of this rank's own; rank 0 returns the times and the most bytes that any rank held."""
    world = join_world(config.runtime.device)
    apply_process_settings(config)
    config, teacher = placed_teacher(config, world.device)
    jepa, target_encoder = build_networks(config, world.device)
    running = build_engine(jepa, config, world, config.runtime.zero)
    average = TimedAverage(running.follow(target_encoder), world.device)
    batches = [batch.to(world.device) for batch in Work.draw(config, world.device, world.rank).packed(config)]
    objective = build_objective(config, running, target_encoder, world, teacher)
    take_step = Step(running, average, objective, COMPUTE_DTYPES[config.runtime.dtype])
    now, ms = Schedule(config.optimization, STEPS_PER_EPOCH)(0), []
    for _ in range(WARMUP + STEPS):
        barrier()
        start = time.perf_counter()
        take_step(batches, now)
        timing.synchronize(world.device)
        ms.append(1000 * (time.perf_counter() - start))
    resident = timing.resident_bytes("VmHWM") if world.device.type == "cpu" else torch.cuda.max_memory_allocated()
    peak, state = (max(gather_objects(mine)) for mine in (resident, state_bytes(running, average.average)))
    leave_world()
    return dict(ms=ms[WARMUP:], ema_ms=average.ms[WARMUP:], peak_bytes=peak, state_bytes=state) if world.is_main else None


def state_bytes(running: PlainEngine | ZeroEngine, average) -> int:
    """Return the bytes of weights, moments and averages that this rank keeps between steps, each storage once."""
    tensors = [*running.jepa.parameters(), *average.target_encoder.parameters()]
    tensors += [p.ds_tensor for p in running.jepa.parameters() if hasattr(p, "ds_tensor")]
    tensors += [tensor for state in running.optimizer.state.values() for tensor in state.values()]
    tensors += [piece.tensor for piece in running.masters().values()] if isinstance(running, ZeroEngine) else []
    tensors += [flat for part in getattr(average, "parts", ()) for flat in (part.average, part.sent)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


if __name__ == "__main__":
    if (measured := measure_rank(config_from_dict(json.loads(sys.argv[1])))) is not None:
        print(json.dumps(measured), flush=True)
    os._exit(0)  # at an ordinary end a thread of torch's now and then aborts the process
