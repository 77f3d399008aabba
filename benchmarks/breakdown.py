"""The time of training steps by part, loader included: `python benchmarks/step.py --breakdown`.

A part ends where the next one begins, so the parts add up to the step. Hooks on the networks and on gradients mark the
beginnings. The gradients of the predictions and of the context features divide the backward: they are ready when the
backward of the loss and that of the predictor are done. On CUDA the times are those of the device, and nothing waits within
a step. The FLOPs of a part (`fastjepa.plan.flops`) stand beside the measured rate of matrix products.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import timing
import torch
from photographs import photographs
from timing import Ceiling, PhaseClock, Spread
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from work import TrainerStep, mlp_shapes

from fastjepa.config.schema import Config
from fastjepa.data.sources import open_source
from fastjepa.engine.precision import COMPUTE_DTYPES
from fastjepa.errors import UserError
from fastjepa.loader.batch import Batch
from fastjepa.loader.loader import Loader
from fastjepa.plan.flops import flops_of_packed
from fastjepa.plan.plan import workload_of
from fastjepa.ranks.world import World, join_world

WAIT, REST = "data wait", "remainder"  # the remainder is Python between the parts
NETWORK_PARTS = ("target forward", "context forward", "context backward", "predictor forward", "predictor backward")
PARTS = (WAIT, "target forward", "context forward", "predictor forward", "loss", "predictor backward", "context backward",
         "optimizer", "EMA")  # fmt: skip
WARMUP, TRACED = 2, 3  # steps before those that are timed, and after them under the profiler


class PartMarks:
    """The marks of a step whose parts are timed; inside `with` the networks, engine and average of the step set them."""

    def __init__(self, step: TrainerStep):
        self.step, self.undo, self.part = step, contextlib.ExitStack(), REST

    def __enter__(self) -> "PartMarks":
        jepa, target = self.step.jepa, self.step.average.target_encoder
        for network, part in ((target, "target forward"), (jepa.encoder, "context forward"),
                              (jepa.predictor, "predictor forward")):  # fmt: skip
            self.hook(network.register_forward_pre_hook, lambda *_, part=part: self.begin(part))
        self.hook(jepa.encoder.register_forward_hook, lambda *args: self.on_gradient(args[-1], "context backward"))
        self.hook(jepa.predictor.register_forward_hook, lambda *args: self.on_gradient(args[-1], "predictor backward"))
        self.hook(jepa.predictor.register_forward_hook, lambda *_: self.begin("loss"))
        for owner, name, part in ((self.step.engine, "step", "optimizer"), (self.step.average, "update", "EMA")):
            setattr(owner, name, self.within(part, getattr(owner, name)))
            self.undo.callback(delattr, owner, name)
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo.close()

    def hook(self, register: Callable, call: Callable[..., None]) -> None:
        self.undo.callback(register(call).remove)

    def on_gradient(self, features: Tensor, part: str) -> None:
        if features.requires_grad:
            features.register_hook(lambda _: self.begin(part))

    def within(self, part: str, call: Callable) -> Callable:
        def marked(*args: Any) -> Any:
            self.begin(part)
            found = call(*args)
            self.begin(REST)
            return found

        return marked

    def begin(self, part: str) -> None:
        self.clock.mark(self.part)
        self.part = part
        with record_function(f"begins: {part}"):  # a moment in a trace: a range would end on another thread on CUDA
            pass

    def take(self, batches: Iterable[Batch]) -> PhaseClock:
        """Take one training step; the clock reads its milliseconds by part."""
        self.clock = PhaseClock(self.step.device)
        self.step.take(self.waited(batches))
        self.clock.mark(REST)
        return self.clock

    def waited(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        self.begin(WAIT)
        for batch in batches:
            self.begin(REST)
            yield batch
            self.begin(WAIT)
        self.begin(REST)


def refuse_whole_steps(config: Config) -> None:
    for key in ("compile", "cuda_graph"):
        if getattr(config.runtime, key):
            raise UserError(f"--breakdown: such a step is one piece and has no parts; set runtime.{key}=false")
    if config.loss.target == "pixels" or config.meta.teacher:
        raise UserError("--breakdown: the target encoder has a part in it; set loss.target=output, and leave meta.teacher out")


def measure_parts(config: Config, rounds: int, trace: Path | None = None) -> list[dict]:
    """Return a row for each part of `rounds` steps, and a last row for the whole step; keys are those of `--json`."""
    refuse_whole_steps(config)
    device, packed = join_world(config.runtime.device).device, []
    with (
        with_images(config) as config,
        Loader(config, open_source(config.data.address), World(0, 0, 1, device), 0) as loader,
        PartMarks(TrainerStep(config, device)) as marks,
    ):
        steps = (marks.take(kept(loader.micro_batches(number), packed)) for number in range(2**40))
        for _ in range(WARMUP):
            next(steps)
        ceiling = Ceiling([*mlp_shapes(config), timing.square_product(device)], COMPUTE_DTYPES[config.runtime.dtype], device)
        ceiling(0)
        packed.clear()
        timing.synchronize(device)
        start = time.perf_counter()
        clocks = [next(steps) for _ in range(rounds)]
        timing.synchronize(device)
        seconds = (time.perf_counter() - start) / rounds
        counted = [astuple(flops_of_packed(workload_of(config), *micro)) for micro in packed]
        spent = np.sum(counted, axis=0) * config.micro_batch / rounds
        ceiling(1)
        if trace:
            write_trace(steps, device, trace)
    gemm, flops_of = max(ceiling.rates.values()), dict(zip(NETWORK_PARTS, spent.tolist(), strict=True))
    about = {"model": config.meta.model_name, "dtype": config.runtime.dtype, "batch": config.data.batch_size, "n": rounds,
             "gemm_gflops": gemm / 1e9}  # fmt: skip
    return [row | about for row in part_rows([clock.read() for clock in clocks], seconds, flops_of, gemm)]


def kept(batches: Iterable[Batch], packed: list[tuple]) -> Iterator[Batch]:
    """Yield the batches and keep their context, target and blocks, whose FLOPs are counted later."""
    for batch in batches:
        packed.append((batch.context, batch.target, batch.blocks))
        yield batch


@contextlib.contextmanager
def with_images(config: Config) -> Iterator[Config]:
    """Give the config images to read: of the source that it names, or photographs made for two batches."""
    with tempfile.TemporaryDirectory(prefix="fastjepa-bench-") as folder:
        if config.data.source or config.data.root_path:
            yield config
            return
        for number, raw in enumerate(photographs(2 * config.data.batch_size)):
            (Path(folder) / f"{number:06d}.jpg").write_bytes(raw)
        yield replace(config, data=replace(config.data, source=folder))


def write_trace(steps: Iterator[PhaseClock], device: torch.device, file: Path) -> None:
    """Write a Chrome trace (chrome://tracing, ui.perfetto.dev) of a few further steps, with a mark where a part begins."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(TRACED):
            next(steps)
        timing.synchronize(device)
    profiler.export_chrome_trace(str(file))


def part_rows(steps: list[dict[str, float]], seconds: float, flops_of: dict[str, float], gemm: float) -> Iterator[dict]:
    """Yield a row for each part and for the whole step.

    Args:
        steps: milliseconds of the parts of each step.
        seconds: mean seconds of a step, which the shares refer to.
        flops_of: FLOPs of a mean step, of the parts that multiply matrices.
        gemm: measured rate of matrix products, in FLOP/s.
    """
    taken = {part: [one.get(part, 0.0) for one in steps] for part in (*PARTS, REST)}
    for part, ms in (taken | {"step": [sum(one.values()) for one in steps]}).items():
        mean, spent = sum(ms) / len(ms) / 1000, flops_of.get(part)
        row = {"part": part, "ms": Spread.of(ms)._asdict(), "share": mean / seconds}
        yield row | {"gflop": spent and spent / 1e9, "of_gemm": spent and spent / mean / gemm}
