"""Time one training step, alone or beside the official code: `python benchmarks/step.py --device cpu --model vit_small`.

Synthetic images, real masks, and the trainer's own networks, engine and step; packing and loading are not part of it.
With `--reference DIR` an unmodified clone of the official code trains on the same images from the same weights, in turns
with ours. Its contexts are cut to the shortest of the batch, which is what `mask.truncate: batch_min` does.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import breakdown
import numpy as np
import official
import sharded
import timing
import torch
from options import config_of, int_list, make_parser, run_script
from timing import Ceiling, PhaseClock, Spread
from torch import Tensor
from work import TrainerStep, Work, mlp_shapes, prepare_device

from fastjepa.config.schema import Config
from fastjepa.engine.precision import COMPUTE_DTYPES
from fastjepa.errors import UserError
from fastjepa.plan.flops import official_flops
from fastjepa.plan.plan import workload_of

DISTINCT = 4  # batches that the rounds take turns with
AGREE_STEPS, LOSS_TOLERANCE = 3, 1e-4  # relative, between the two losses of each of these steps
EXAMPLES = """examples:
  python benchmarks/step.py --device cpu --model vit_small --reference ../ijepa
  python benchmarks/step.py --breakdown --trace trace.json data.source=/data/imagenet/train
  python benchmarks/step.py --device cpu --model vit_base --batch 32 --zero 0,1,2,3 --ranks 2
  python benchmarks/step.py --device cuda --model vit_huge --batch 128 mask.patch_size=14 runtime.compile=true --json"""


class OurStep(TrainerStep):
    """The step of this package on batches of its own; call it with the number of a round."""

    def __init__(self, config: Config, device: torch.device, works: list[Work]):
        super().__init__(config, device)
        self.flops = [work.flops_per_image(config) for work in works]
        self.batches = [[batch.to(device) for batch in work.packed(config)] for work in works]

    def __call__(self, number: int) -> Tensor:
        return self.take(self.batches[number % len(self.batches)])

    def phases(self, number: int) -> dict[str, float]:
        """Return the milliseconds of each part of one step; none where the step is compiled or captured as one piece."""
        if self.config.runtime.compile or self.config.runtime.cuda_graph:
            return {}
        with breakdown.PartMarks(self) as marks:
            taken = marks.take(self.batches[number % len(self.batches)]).read()
        return {part: taken[part] for part in breakdown.PARTS if part != breakdown.WAIT}


class OfficialStep:
    """The step of the official code on the same batches."""

    def __init__(self, config: Config, device: torch.device, works: list[Work], directory: str):
        self.official, self.device = official.Official(directory, config, device), device
        self.works = [(w.images, w.indices(w.context_mask), w.indices(w.target_mask)) for w in works]
        lengths = [(contexts[0].shape[1], blocks[0].shape[1]) for _, contexts, blocks in self.works]
        self.flops = [official_flops(workload_of(config), *pair).total for pair in lengths]

    def __call__(self, number: int, mark: Callable[[str], None] = lambda phase: None) -> float:
        return self.official.step(*self.works[number % len(self.works)], mark)

    def phases(self, number: int) -> dict[str, float]:
        clock = PhaseClock(self.device)
        self(number, clock.mark)
        return clock.read()


def build_contender(
    name: str, config: Config, device: torch.device, works: list[Work], directory: str | None
) -> OurStep | OfficialStep:
    return OurStep(config, device, works) if name == "ours" else OfficialStep(config, device, works, directory)


def measure_step(config: Config, rounds: int, directory: str | None = None) -> list[dict]:
    """Return the row of this package; with a directory, also its ratio to the official code, and the row of that."""
    names = ("ours", "theirs") if directory else ("ours",)
    if directory:
        official.refuse_config(directory, config)
    device = prepare_device(config, config.data.batch_size)
    peaks = {name: timing.in_fresh_process(peak_of_contender, config, name, directory) for name in names}
    if directory:
        insist_on_equal_losses(config, device, directory)
    works = [Work.draw(config, device, number) for number in range(min(rounds, DISTINCT))]
    runs = {name: build_contender(name, config, device, works, directory) for name in names}
    if directory:
        runs["theirs"].official.start_from(runs["ours"].jepa)
    ceiling = Ceiling([*mlp_shapes(config), timing.square_product(device)], COMPUTE_DTYPES[config.runtime.dtype], device)
    seconds = timing.interleave({"ceiling": ceiling, **runs}, rounds, device, warmup=len(works))
    rates = [ceiling.rates[number] for number in range(rounds)]
    rows = [contender_row(run, seconds[name], rates, config, peaks[name]) for name, run in runs.items()]
    if directory:
        rows[0]["ratio"] = timing.paired_ratio(seconds["ours"], seconds["theirs"])._asdict()
    return rows


def insist_on_equal_losses(config: Config, device: torch.device, directory: str) -> None:
    """Raise UserError unless both compute the same losses, in fp32 on two images for a few steps.

    The weights are perturbed: those that training starts from hardly look at the context, and a wrong one would pass.
    """
    runtime = replace(config.runtime, dtype="fp32", micro_batch=None, attention="auto", compile=False)
    mask = replace(config.mask, truncate="batch_min", sampling="official")
    config = replace(config, data=replace(config.data, batch_size=2), mask=mask, runtime=runtime)
    works = [Work.draw(config, device, number) for number in range(AGREE_STEPS)]
    ours, theirs = OurStep(config, device, works), OfficialStep(config, device, works, directory)
    perturb(ours.jepa)
    ours.target_encoder.load_state_dict(ours.jepa.encoder.state_dict())
    theirs.official.start_from(ours.jepa)
    for number in range(AGREE_STEPS):
        one, other = float(ours(number)), theirs(number)
        if not abs(one - other) <= LOSS_TOLERANCE * abs(other):
            raise UserError(f"losses differ at step {number}, {one:.6f} here and {other:.6f} there: is the clone unmodified?")


@torch.no_grad()
def perturb(network: torch.nn.Module) -> None:
    """Add noise that makes the output of every layer about as large as its input, and every norm different."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.add_(noise * (0.7 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1))


def contender_row(
    run: OurStep | OfficialStep, seconds: list[float], rates: list[float], config: Config, peak_bytes: int
) -> dict:
    images, spent = config.data.batch_size, [run.flops[number % len(run.flops)] for number in range(len(seconds))]
    median = Spread.of(seconds).median
    shares = [images * f / s / rate for f, s, rate in zip(spent, seconds, rates, strict=True)]
    phases = [run.phases(number) for number in range(min(len(seconds), DISTINCT))]
    return {
        "contender": "fastjepa" if isinstance(run, OurStep) else "official", "dtype": config.runtime.dtype,
        "images_per_s": images / median, "ms": 1000 * median,
        "phases": {name: Spread.of([p[name] for p in phases]).median for name in phases[0]},
        "gflop_per_image": float(np.mean(run.flops)) / 1e9, "gemm_gflops": Spread.of(rates).median / 1e9,
        "mfu": Spread.of(shares).median, "peak_bytes": peak_bytes,
    }  # fmt: skip


def peak_of_contender(config: Config, name: str, directory: str | None) -> int:
    """Return the peak memory of the networks, batches and first steps of one contender; run it in a fresh process."""
    device = prepare_device(config, config.data.batch_size)
    works = [Work.draw(config, device, number) for number in range(2)]
    return timing.peak_bytes(lambda: build_contender(name, config, device, works, directory), device)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    about = "Time one training step on synthetic images with real masks, or dissect steps on real batches."
    defaults = {"device": "auto", "model": "vit_small", "dtype": "auto", "batch": 16, "size": 224, "threads": None}
    parser = make_parser(about, EXAMPLES, **defaults, rounds=12)
    parser.add_argument("--reference", metavar="DIR", help="clone of the official code to time beside ours")
    parser.add_argument("--breakdown", action="store_true", help="the time of steps by part, loader included")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a Chrome trace (JSON) of a few steps of the breakdown")
    parser.add_argument("--zero", type=int_list, metavar="S,S", help="compare ZeRO stages (0 to 3), ranks sharing the batch")
    parser.add_argument("--ranks", type=int_list, default=[1], metavar="N,N", help="numbers of ranks that --zero compares")
    return parser.parse_intermixed_args(argv)


def to_config(options: argparse.Namespace) -> Config:
    return config_of(options, mask__truncate_group=options.batch)


def measure_asked(options: argparse.Namespace) -> list[dict]:
    config = to_config(options)
    if options.zero is not None:
        return sharded.compare_stages(config, options.zero, options.ranks, options.rounds)
    if options.breakdown or options.trace:
        if options.trace and not options.trace.absolute().parent.is_dir():
            raise UserError(f"{options.trace}: there is no folder {options.trace.parent}; make it first")
        prepare_device(config, config.data.batch_size)
        return breakdown.measure_parts(config, options.rounds, options.trace)
    return measure_step(config, options.rounds, options.reference)


def main(argv: list[str] | None = None) -> int:
    return run_script("step.py", parse_options(argv), measure_asked)


if __name__ == "__main__":
    sys.exit(main())
