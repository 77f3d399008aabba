"""Step time, the average's share of it, and memory by ZeRO stage and ranks: `python benchmarks/step.py --zero 0,1 --ranks 1,2`.

The global batch stays the same. Every stage and number of ranks runs in processes of its own, started by torchrun, and
they take turns, so that a disturbance of the machine meets them all.
"""

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import timing
import torch
from timing import Spread

from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import Config
from fastjepa.engine.build import build_engine
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.schedule import Schedule
from fastjepa.engine.zero import ZeroEngine
from fastjepa.errors import ConfigError
from fastjepa.ranks.collectives import barrier, gather_objects
from fastjepa.ranks.world import join_world, leave_world
from fastjepa.run.build import apply_process_settings, build_average, build_networks
from fastjepa.run.step import take_step

STEPS, WARMUP = 3, 1  # of each start


def compare(config: Config, stages: list[int], ranks: list[int], rounds: int) -> list[dict]:
    """A row for every stage and number of ranks; ConfigError where the batch does not divide or a start fails."""
    for count in ranks:
        if config.data.batch_size % count:
            raise ConfigError(f"--batch {config.data.batch_size}: must be a multiple of --ranks {count}")
    cases = [(stage, count) for count in ranks for stage in stages]
    found = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            found[case].append(start(config, *case))
    return [{"dtype": config.runtime.dtype} | row(*case, starts) for case, starts in found.items()]


def start(config: Config, stage: int, ranks: int) -> dict:
    """One start of all ranks; what rank 0 measured."""
    data = dataclasses.replace(config.data, batch_size=config.data.batch_size // ranks)
    runtime = dataclasses.replace(config.runtime, zero=stage)
    asked = json.dumps(dataclasses.replace(config, data=data, runtime=runtime).to_dict())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), __file__, asked]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"stage {stage} on {ranks} ranks failed: {said(done.stderr)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def said(stderr: str) -> str:
    """The first rank's error, which torch marks with its rank once all have met; of one killed, torchrun's words."""
    errors = re.findall(r"^(?:\[rank\d+\]: )?\S*Error: .+", stderr, re.MULTILINE)
    causes = re.findall(r"^ +(?:rank|exitcode) +: .+", stderr.partition("Root Cause")[2], re.MULTILINE)
    return errors[0] if errors else "; ".join(" ".join(line.split()) for line in causes) or stderr[-300:]


def row(stage: int, ranks: int, starts: list[dict]) -> dict:
    steps = Spread.of([ms for one in starts for ms in one["ms"]])
    share = Spread.of([ema / ms for one in starts for ema, ms in zip(one["ema_ms"], one["ms"], strict=True)])
    return {"zero": stage, "ranks": ranks, "ms": steps.median, "p20": steps.p20, "p80": steps.p80, "n": len(starts) * STEPS,
            "ema_share": share.median, "peak_bytes": max(one["peak_bytes"] for one in starts),
            "state_bytes": starts[0]["state_bytes"]}  # fmt: skip


def report(rows: list[dict]) -> Iterator[str]:
    yield "zero  ranks  ms a step (p20 to p80)      EMA and its gather  state a rank  peak a rank"
    for one in rows:
        yield ("{zero:>4}  {ranks:>5}  {ms:8.1f} ({p20:.1f} to {p80:.1f})  {ema_share:18.1%}".format(**one).ljust(58)
               + f"{one['state_bytes'] / 2**20:9.0f} MiB {one['peak_bytes'] / 2**20:8.0f} MiB")  # fmt: skip


def worker(config: Config) -> dict | None:
    """Steps of this rank on its own batches; rank 0 returns the times and the most that any rank held."""
    from step import Work

    world = join_world(config.runtime.device)
    apply_process_settings(config)
    jepa, target_encoder = build_networks(config, world.device)
    running = build_engine(jepa, config, world, config.runtime.zero)
    average, _ = build_average(running, target_encoder, config)
    batches = [batch.to(world.device) for batch in Work.draw(config, world.device, world.rank).packed(config)]
    now, times, ema_times = Schedule(config.optimization, steps_per_epoch=1000)(0), [], []
    timed = Timed(average, ema_times)
    for _ in range(WARMUP + STEPS):
        barrier()
        begun = time.perf_counter()
        take_step(running, timed, batches, now, config)
        wait()
        times.append(1000 * (time.perf_counter() - begun))
    resident = timing.resident_bytes("VmHWM") if world.device.type == "cpu" else torch.cuda.max_memory_allocated()
    peak, state = (max(gather_objects(mine)) for mine in (resident, held(running, average)))
    leave_world()
    kept = {"ms": times[WARMUP:], "ema_ms": ema_times[WARMUP:], "peak_bytes": peak, "state_bytes": state}
    return kept if world.is_main else None


def held(running: PlainEngine | ZeroEngine, average) -> int:
    """Bytes of the weights, moments and averages that this rank keeps between steps; tensors that share storage count once."""
    tensors = [*running.jepa.parameters(), *average.target_encoder.parameters()]
    tensors += [p.ds_tensor for p in running.jepa.parameters() if hasattr(p, "ds_tensor")]
    tensors += [tensor for state in running.optimizer.state.values() for tensor in state.values()]
    tensors += [piece.tensor for piece in running.masters().values()] if isinstance(running, ZeroEngine) else []
    tensors += [flat for part in getattr(average, "parts", ()) for flat in (part.average, part.sent)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Timed:
    """An average whose updates are timed."""

    def __init__(self, average, times: list[float]):
        self.average, self.times, self.target_encoder = average, times, average.target_encoder

    def update(self, *args) -> None:
        wait()
        begun = time.perf_counter()
        self.average.update(*args)
        wait()
        self.times.append(1000 * (time.perf_counter() - begun))


def wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


if __name__ == "__main__":
    if (measured := worker(config_from_dict(json.loads(sys.argv[1])))) is not None:
        print(json.dumps(measured), flush=True)
