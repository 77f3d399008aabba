"""Time one training step, alone or beside the official code: `python benchmarks/step.py --device cpu --model vit_small`.

Synthetic images, real masks, and the trainer's own networks, engine and step; packing and loading are not part of it.
With `--reference DIR` an unmodified clone of the official code trains on the same images from the same weights, its
contexts cut to the shortest of the batch (which is what `mask.truncate: batch_min` does), interleaved with ours.
"""

import argparse
import contextlib
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import breakdown
import numpy as np
import official
import roofline
import sharded
import timing
import torch
from breakdown import Dissected
from options import config_of, numbers
from timing import Ceiling, Clock, Spread
from torch import Tensor

from fastjepa.config.schema import MODELS, Config
from fastjepa.engine.average import Average
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.precision import compute_dtype
from fastjepa.engine.schedule import Schedule
from fastjepa.errors import ConfigError, UserError
from fastjepa.loader.batch import Batch
from fastjepa.masks.check import check_masks
from fastjepa.masks.draw import draw_masks
from fastjepa.masks.pack import pack
from fastjepa.masks.padding import padding_budget
from fastjepa.plan.flops import Flops, flops_of_packed, official_flops
from fastjepa.ranks.world import join_world
from fastjepa.run.build import apply_process_settings, build_networks
from fastjepa.run.step import micro_step, take_step

DISTINCT = 4  # batches that the rounds take turns with
EXAMPLES = """examples:
  python benchmarks/step.py --device cpu --model vit_small --reference ../ijepa
  python benchmarks/step.py --breakdown --picture breakdown.svg --trace trace.json data.source=/data/imagenet/train
  python benchmarks/step.py --device cuda --model vit_huge --batch 128 mask.patch_size=14 runtime.compile=true --json"""
AGREE_STEPS, LOSS_TOLERANCE = 3, 1e-4  # relative, between the two losses of each of these steps


@dataclass(frozen=True)
class Work:
    """One global batch, as both contenders see it."""

    images: Tensor  # (B, C, H, W) fp32
    context_mask: np.ndarray  # (B, K, N) bool
    target_mask: np.ndarray  # (B, R, N) bool

    @classmethod
    def draw(cls, config: Config, device: torch.device, number: int) -> "Work":
        total, seed = config.data.batch_size, config.runtime.seed
        generator = torch.Generator().manual_seed(seed + number)
        images = torch.randn(total, config.data.channels, *config.image_size, generator=generator)
        return cls(images.to(device), *draw_masks(config.mask, config.grid, seed, number, range(total), total))

    def packed(self, config: Config, pad: bool = True) -> list[Batch]:
        """The trainer's micro-batches, on the host but for their images; for a CUDA graph padded."""
        room = padding_budget(config, len(self.images)) if pad and config.runtime.cuda_graph else None
        starts = range(0, len(self.images), config.micro_batch)
        parts = [slice(start, start + config.micro_batch) for start in starts]
        return [Batch(self.images[s], *pack(self.context_mask[s], self.target_mask[s], len(self.images),
                                                    config.joint, room, config.separate), bad=()) for s in parts]  # fmt: skip

    def indices(self, mask: np.ndarray) -> list[Tensor]:
        """(B, M, N) -> M tensors (B, length) of patch indices, each mask cut to the shortest, in raster order."""
        shortest = int(mask.sum(axis=2).min())
        kept = mask & (np.cumsum(mask, axis=2) <= shortest)
        return [torch.from_numpy(np.nonzero(one)[1].reshape(len(mask), shortest)).to(self.images.device)
                for one in kept.transpose(1, 0, 2)]  # fmt: skip


class Ours:
    """This package's step: call it with the number of a round."""

    def __init__(self, config: Config, device: torch.device, works: list[Work]):
        self.config, self.device = config, device
        self.jepa, self.target_encoder = build_networks(config, device)
        pieces, static = config.data.batch_size // config.micro_batch, config.runtime.cuda_graph
        self.engine = PlainEngine(self.jepa, micro_batches=pieces, static_gradients=static)
        self.average = Average(self.target_encoder, self.jepa.encoder)
        self.dissected = Dissected(self.engine, self.average, config, join_world(config.runtime.device))
        self.spread = self.dissected.spread
        self.micro = micro_step(self.engine, self.average, config, spread=self.spread)
        self.flops = [mean_total([flops_of_packed(config, b.context, b.target, b.blocks) for b in work.packed(config, pad=False)])
                      for work in works]  # fmt: skip
        self.batches = [[batch.to(device) for batch in work.packed(config)] for work in works]
        self.now = Schedule(config.optimization, steps_per_epoch=1000)(0)

    def __call__(self, number: int) -> Tensor:
        batches = self.batches[number % len(self.batches)]
        return take_step(self.engine, self.average, batches, self.now, self.config, self.spread, self.micro).loss

    def phases(self, number: int) -> dict[str, float]:
        """Milliseconds of each part of one step; none of a CUDA graph, which is one launch."""
        if self.config.runtime.cuda_graph:
            return {}
        taken = self.dissected.take(self.batches[number % len(self.batches)], self.now).read()
        return {part: taken[part] for part in breakdown.PARTS if part != breakdown.WAIT}


class Theirs:
    """The official step on the same batches."""

    def __init__(self, config: Config, device: torch.device, works: list[Work], directory: str):
        self.official, self.device = official.Official(directory, config, device), device
        self.works = [(w.images, w.indices(w.context_mask), w.indices(w.target_mask)) for w in works]
        self.flops = [
            official_flops(config, contexts[0].shape[1], blocks[0].shape[1]).total for _, contexts, blocks in self.works
        ]

    def __call__(self, number: int, mark: Callable[[str], None] = lambda phase: None) -> float:
        return self.official.step(*self.works[number % len(self.works)], mark)

    def phases(self, number: int) -> dict[str, float]:
        clock = Clock(self.device)
        self(number, clock.mark)
        return clock.read()


def mean_total(parts: list[Flops]) -> float:
    return float(np.mean([part.total for part in parts]))


def measure(config: Config, rounds: int, directory: str | None = None) -> dict:
    """The result of the benchmark, with the keys that `--json` prints; see `report` for their units."""
    if directory:
        official.check(directory, config)
    device = start(config)
    peaks = {name: timing.in_fresh_process(peak, config, name, directory) for name in contenders(directory)}
    if directory:
        agree(config, device, directory)
    works = [Work.draw(config, device, number) for number in range(min(rounds, DISTINCT))]
    runs = {name: build(name, config, device, works, directory) for name in contenders(directory)}
    if directory:
        runs["theirs"].official.start_from(runs["ours"].jepa)
    dtype = compute_dtype(config)
    ceiling = Ceiling([*linears(config, works[0]), timing.square(device)], dtype, device)
    seconds = timing.interleave({"ceiling": ceiling, **runs}, rounds, device, warmup=len(works))
    rates = [ceiling.rates[number] for number in range(rounds)]
    results = {name: summary(run, seconds[name], rates, config, peaks[name]) for name, run in runs.items()}
    result = results["ours"]
    if directory:
        result["reference"] = results["theirs"]
        result["ratio"] = timing.ratio(seconds["ours"], seconds["theirs"])._asdict()
    return result


def contenders(directory: str | None) -> tuple[str, ...]:
    return ("ours", "theirs") if directory else ("ours",)


def start(config: Config) -> torch.device:
    """Check the config, set the threads, and return the device."""
    device = join_world(config.runtime.device).device
    check_masks(config.mask, config.grid, config.runtime.seed, config.data.batch_size)
    apply_process_settings(config)
    torch.manual_seed(config.runtime.seed)
    return device


def build(name: str, config: Config, device: torch.device, works: list[Work], directory: str | None) -> Ours | Theirs:
    return Ours(config, device, works) if name == "ours" else Theirs(config, device, works, directory)


def agree(config: Config, device: torch.device, directory: str) -> None:
    """Insist that both compute the same losses, in fp32 on two images for a few steps; ConfigError where they do not.

    From perturbed weights: those that training starts from hardly look at the context, and a wrong one would pass.
    """
    config = replace(
        config,
        data=replace(config.data, batch_size=2),
        mask=replace(config.mask, truncate="batch_min", sampling="official"),
        runtime=replace(config.runtime, dtype="fp32", micro_batch=None, attention="auto", compile=False),
    )
    works = [Work.draw(config, device, number) for number in range(AGREE_STEPS)]
    ours, theirs = Ours(config, device, works), Theirs(config, device, works, directory)
    perturb(ours.jepa)
    ours.target_encoder.load_state_dict(ours.jepa.encoder.state_dict())
    theirs.official.start_from(ours.jepa)
    for number in range(AGREE_STEPS):
        one, other = float(ours(number)), theirs(number)
        if not abs(one - other) <= LOSS_TOLERANCE * abs(other):
            raise ConfigError(f"losses differ at step {number}, {one:.6f} here and {other:.6f} there: is the clone unmodified?")


@torch.no_grad()
def perturb(network: torch.nn.Module) -> None:
    """Add noise that makes every layer's output about as large as its input, and every norm its own."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.add_(noise * (0.7 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1))


def linears(config: Config, work: Work) -> list[tuple[int, int, int]]:
    """(rows, in, out) of the largest layers of the step: the target encoder's and the predictor's mlp."""
    dim, _, _, mlp_ratio = config.encoder_shape
    narrow = config.meta.pred_emb_dim
    tokens = len(work.images) * work.context_mask.shape[2]
    blocks = work.packed(config)[0].blocks
    return [(tokens, dim, round(dim * mlp_ratio)), (len(blocks.sequences.idx), narrow, 4 * narrow)]


def summary(run: Ours | Theirs, seconds: list[float], rates: list[float], config: Config, peak_bytes: int) -> dict:
    images, work = config.data.batch_size, [run.flops[number % len(run.flops)] for number in range(len(seconds))]
    median = Spread.of(seconds).median
    shares = [images * f / s / rate for f, s, rate in zip(work, seconds, rates, strict=True)]
    phases = [run.phases(number) for number in range(min(len(seconds), DISTINCT))]
    return {
        "dtype": config.runtime.dtype,
        "images_per_s": images / median,
        "ms": 1000 * median,
        "phases": {name: Spread.of([p[name] for p in phases]).median for name in phases[0]},
        "gflop_per_image": float(np.mean(run.flops)) / 1e9,
        "gemm_gflops": Spread.of(rates).median / 1e9,
        "mfu": Spread.of(shares).median,
        "peak_bytes": peak_bytes,
    }


def peak(config: Config, name: str, directory: str | None) -> int:
    """Peak memory of one contender's networks, batches and first steps; runs in a process of its own."""
    device = start(config)
    return timing.peak_bytes(
        lambda: build(name, config, device, [Work.draw(config, device, number) for number in range(2)], directory), device
    )


def report(result: dict, config: Config) -> Iterator[str]:
    """The lines that are printed without `--json`."""
    size, meta = " x ".join(map(str, config.image_size)), config.meta
    yield f"{meta.model_name}, {size} px, batch {config.data.batch_size}, predictor {meta.pred_depth} x {meta.pred_emb_dim}"
    yield f"{config.runtime.dtype}, mask.truncate {config.mask.truncate}, {torch.get_num_threads()} threads, {where(config)}"
    yield from lines("fastjepa", result)
    if "reference" in result:
        yield from lines("official", result["reference"])
        yield "ratio of images/s: {median:.3f} (p20 {p20:.3f}, p80 {p80:.3f})".format(**result["ratio"])
        if config.mask.truncate != "batch_min" or config.mask.sampling != "official":
            yield "  not equal work: the official code sees masks cut to the shortest of the batch"


def lines(name: str, one: dict) -> Iterator[str]:
    memory = one["peak_bytes"] / 2**20
    yield f"{name}: {one['images_per_s']:.2f} images/s, {one['ms']:.1f} ms a step, peak memory {memory:.0f} MiB"
    yield f"  {one['gflop_per_image']:.2f} GFLOP an image, {one['mfu']:.1%} of the {one['gemm_gflops']:.0f} GFLOP/s ceiling"
    yield "  ms by phase: " + ", ".join(f"{phase} {ms:.1f}" for phase, ms in one["phases"].items())


def where(config: Config) -> str:
    device = join_world(config.runtime.device).device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{machine}, torch {torch.__version__}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time one training step on synthetic images with real masks, or dissect steps on real batches.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--model", default="vit_small", choices=tuple(MODELS), metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--size", type=int, default=224, help="side of an image in pixels")
    parser.add_argument("--pred-depth", type=int, default=6, help="predictor blocks")
    parser.add_argument("--truncate", default="batch_min", choices=("batch_min", "none", "fraction"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each contender")
    parser.add_argument("--reference", metavar="DIR", help="clone of the official code to time beside ours")
    parser.add_argument("--breakdown", action="store_true", help="where the time of steps goes, loader included, and rooflines")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="the breakdown as a PNG, SVG or PDF")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="a Chrome trace (JSON) of a few steps with their parts named"
    )
    parser.add_argument("--zero", type=numbers, metavar="S,S", help="compare ZeRO stages (0 to 3), ranks sharing the batch")
    parser.add_argument("--ranks", type=numbers, default=[1], metavar="N,N", help="numbers of ranks that --zero compares")
    parser.add_argument("--json", action="store_true", help="print JSON: one object, or with --zero and --breakdown rows")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any further key of the config")
    return parser.parse_intermixed_args(argv)


def to_config(options: argparse.Namespace) -> Config:
    keys = {
        "runtime.device": options.device,
        "meta.model_name": options.model,
        "runtime.dtype": options.dtype,
        "data.batch_size": options.batch,
        "mask.truncate_group": options.batch,
        "data.crop_size": options.size,
        "meta.pred_depth": options.pred_depth,
        "mask.truncate": options.truncate,
        "runtime.threads": options.threads,
    }
    return config_of(keys, options.overrides)


def run(options: argparse.Namespace) -> tuple[dict | list[dict], Iterator[str]]:
    """The result, and the lines that show it."""
    if options.rounds < 1:
        raise ConfigError(f"--rounds {options.rounds}: time at least one round")
    config = to_config(options)
    if options.zero is not None:
        result = sharded.compare(config, options.zero, options.ranks, options.rounds)
        return result, sharded.report(result)
    if options.breakdown or options.picture or options.trace:
        return dissect(config, options)
    result = measure(config, options.rounds, options.reference)
    return result, report(result, config)


def dissect(config: Config, options: argparse.Namespace) -> tuple[list[dict], Iterator[str]]:
    for file in filter(None, (options.picture, options.trace)):
        if not file.absolute().parent.is_dir():
            raise ConfigError(f"{file}: cannot be written, there is no folder {file.parent}; make it first")
    if options.picture:
        roofline.canvas(options.picture)
    start(config)
    rows = breakdown.measure(config, options.rounds, options.trace)
    if options.picture:
        roofline.picture(rows, options.picture)
    return rows, breakdown.report(rows)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result, shown = run(options)
    except (UserError, OSError) as error:
        print(f"benchmarks/step.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result) if options.json else "\n".join(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
