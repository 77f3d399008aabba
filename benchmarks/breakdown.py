"""Where the time of training steps goes, loader included: `python benchmarks/step.py --breakdown`.

A part ends where the next one begins, so that parts tile a step and nothing is counted twice. The backward is divided by hooks
on the gradients of the predictions and of the context features, which are ready when loss and predictor are done. On CUDA all
times are the device's (events; nothing waits within the steps), `data wait` is how long it had nothing to do for want of a
batch, and what a profile of further steps shows no kernel for is taken from the other parts as launch gaps.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import roofline
import timeline
import timing
import torch
from photographs import photographs
from roofline import Machine, Work
from timing import Clock, Spread
from torch import Tensor

from fastjepa.config.schema import Config
from fastjepa.data.sources import open_source
from fastjepa.engine.average import Average
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.schedule import Schedule, StepSettings
from fastjepa.errors import ConfigError
from fastjepa.loader.batch import Batch
from fastjepa.loader.loader import Loader
from fastjepa.ranks.world import World, join_world
from fastjepa.run.build import build_networks, build_regularizer
from fastjepa.run.step import take_step

WAIT, GAPS, REST = "data wait", "launch gaps", "remainder"  # REST: Python between the marks, and the log's means
PARTS = (WAIT, "target forward", "context forward", "predictor forward", "loss", "predictor backward", "context backward",
         "optimizer", "EMA")  # fmt: skip
WARMUP, TRACED = 2, 3  # steps before those that are timed, and after them with the profiler


class Dissected:
    """Engine and average of a training step, in one, that mark where its parts begin."""

    def __init__(self, engine: PlainEngine, average: Average, config: Config, world: World):
        self.engine, self.average, self.config, self.device = engine, average, config, world.device
        self.spread = build_regularizer(config, world)
        self.encoder, self.predictor = engine.jepa.encoder, engine.jepa.predictor
        if config.runtime.compile:  # not the step as a whole: it would have no parts
            self.encoder, self.predictor = (torch.compile(one, dynamic=True) for one in (self.encoder, self.predictor))

    def take(self, batches: Iterable[Batch], now: StepSettings) -> Clock:
        """One training step; its clock reads milliseconds by part."""
        self.clock, self.part = Clock(self.device), REST
        take_step(self, self, self.waited(batches), now, self.config, self.spread)
        self.begin(REST)
        self.clock.mark(REST)
        return self.clock

    def begin(self, part: str) -> None:
        self.clock.mark(self.part)
        self.part = part
        timeline.mark(part)

    def waited(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        self.begin(WAIT)
        for batch in batches:
            self.begin(REST)
            yield batch
            self.begin(WAIT)

    def target_encoder(self, *args, **wanted) -> Tensor:
        self.begin("target forward")
        return self.average.target_encoder(*args, **wanted)

    def __call__(self, images: Tensor, context, blocks) -> tuple[Tensor, Tensor]:
        self.begin("context forward")
        features = self.encoder(images, context)
        self.begin("predictor forward")
        prediction = self.predictor(features, context, blocks)
        features.register_hook(lambda _: self.begin("context backward"))
        prediction.register_hook(lambda _: self.begin("predictor backward"))
        self.begin("loss")
        return prediction, features

    def features(self, *args) -> Tensor:
        """The regularizer's survey of all micro-batches."""
        self.begin("loss")
        return self.engine.features(*args)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)  # its last part goes on: the activations are let go as the caller returns

    def step(self, now: StepSettings) -> Tensor:
        self.begin("optimizer")
        return self.engine.step(now)

    def update(self, momentum: float, finite: Tensor) -> None:
        self.begin("EMA")
        self.average.update(momentum, finite)
        self.begin(REST)


class Steps:
    """Training steps on the loader's batches, one after the other: call it for the next one's clock."""

    def __init__(self, config: Config, world: World, loader: Loader):
        jepa, target_encoder = build_networks(config, world.device)
        engine = PlainEngine(jepa, micro_batches=config.data.batch_size // config.micro_batch)
        self.dissected = Dissected(engine, Average(target_encoder, jepa.encoder), config, world)
        self.loader, self.now, self.number = loader, Schedule(config.optimization, loader.steps_per_epoch)(0), 0
        self.packed: list[tuple] = []  # context, target and blocks of every micro-batch

    def __call__(self) -> Clock:
        self.number += 1
        return self.dissected.take(self.kept(self.loader.micro_batches(self.number - 1)), self.now)

    def kept(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.packed.append((batch.context, batch.target, batch.blocks))
            yield batch


def measure(config: Config, rounds: int, trace: Path | None = None) -> list[dict]:
    """A row for each part of `rounds` steps, as `--json` prints them, and a last one for the whole step."""
    if config.runtime.cuda_graph:
        raise ConfigError("--breakdown: a step that is one CUDA graph has no parts to be timed; set runtime.cuda_graph=false")
    if config.loss.target == "pixels":
        raise ConfigError("--breakdown: pixels need no target encoder, whose forward is a part here; set loss.target=output")
    world = join_world(config.runtime.device)
    with feeding(config) as config, Loader(config, open_source(config.data), world, 0) as loader:
        steps = Steps(config, world, loader)
        for _ in range(WARMUP):
            steps()
        before = Machine.measured(config, steps.packed[-1], world.device)
        steps.packed.clear()
        clocks, seconds = timed(steps, rounds, world.device)
        works = roofline.works(config, steps.packed, rounds)
        after = Machine.measured(config, steps.packed[-1], world.device)
        profiled = trace or world.device.type == "cuda"
        busy = timeline.record(steps, TRACED, world.device, trace) if profiled else {}
    machine = Machine(*map(max, zip(before, after, strict=True)))
    return list(rows(config, [apart(clock.read(), busy) for clock in clocks], seconds, works, machine))


def timed(steps: Steps, rounds: int, device: torch.device) -> tuple[list[Clock], float]:
    """The clocks of `rounds` steps, and the mean seconds of a step: from the first to the end of the last, no sum of parts."""
    timing.synchronize(device)
    begun = time.perf_counter()
    clocks = [steps() for _ in range(rounds)]
    timing.synchronize(device)
    return clocks, (time.perf_counter() - begun) / rounds


@contextlib.contextmanager
def feeding(config: Config) -> Iterator[Config]:
    """The config with images to read: the source that it names, or photographs made for two batches."""
    with tempfile.TemporaryDirectory(prefix="fastjepa-bench-") as folder:
        if config.data.source or config.data.root_path:
            yield config
            return
        for number, raw in enumerate(photographs(2 * config.data.batch_size)):
            (Path(folder) / f"{number:06d}.jpg").write_bytes(raw)
        yield replace(config, data=replace(config.data, source=folder))


def apart(parts: dict[str, float], busy: dict[str, float]) -> dict[str, float]:
    """Milliseconds by part, where there was a profile of the device with its launch gaps apart."""
    if not busy:
        return parts
    gaps = {part: max(0.0, parts[part] - busy.get(part, 0.0)) for part in PARTS if part != WAIT}
    return {part: parts[part] - gaps.get(part, 0.0) for part in parts} | {GAPS: sum(gaps.values())}


def rows(
    config: Config, steps: list[dict[str, float]], seconds: float, works: dict[str, Work], machine: Machine
) -> Iterator[dict]:
    about = {"model": config.meta.model_name, "dtype": config.runtime.dtype, "batch": config.data.batch_size, "n": len(steps),
             "gemm_gflops": machine.gemm / 1e9, "copy_gb_s": machine.copy / 1e9}  # fmt: skip
    for part in (*PARTS, *([GAPS] if GAPS in steps[0] else []), REST):
        taken = [parts[part] for parts in steps]
        mean = sum(taken) / len(taken)
        row = {"part": part, "ms": Spread.of(taken)._asdict(), "share": mean / (1000 * seconds)}
        yield row | bounded(works.get(part), mean / 1000, machine) | about
    whole = [sum(parts.values()) for parts in steps]
    yield {"part": "step", "ms": Spread.of(whole)._asdict(), "share": sum(whole) / (1000 * seconds * len(steps))} | about


def bounded(work: Work | None, seconds: float, machine: Machine) -> dict:
    """A part's work, the rate that bounds it, and how near it came to that."""
    if work is None:
        return dict.fromkeys(("gflop", "moved_bytes", "bound", "bound_ms", "of_bound"))
    rate, least = roofline.bound(work, machine)
    return {"gflop": work.flops / 1e9, "moved_bytes": round(work.moved), "bound": rate, "bound_ms": 1000 * least,
            "of_bound": least / seconds}  # fmt: skip


def report(rows: list[dict]) -> Iterator[str]:
    """The lines that are printed without `--json`."""
    *parts, whole = rows
    yield "{model}, batch {batch}, {dtype}, {n} steps; GEMM {gemm_gflops:.0f} GFLOP/s, copy {copy_gb_s:.1f} GB/s".format(
        **whole
    )
    yield "part                      ms (p20 to p80)          share    GFLOP      MB  bound      ms  reached"
    for row in parts:
        yield line(row) + (
            f"{row['gflop']:9.1f}{row['moved_bytes'] / 1e6:8.0f}  {row['bound']:<6}{row['bound_ms']:7.1f}{row['of_bound']:9.0%}"
            if row["bound"] else ""
        )  # fmt: skip
    yield line(whole)


def line(row: dict) -> str:
    return (
        f"{row['part']:<20}" + "{median:9.1f} ({p20:.1f} to {p80:.1f})".format(**row["ms"]).ljust(30) + f"{row['share']:7.1%}"
    )
