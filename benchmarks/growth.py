"""How the cost of a run grows, beside how the maths grow: `python benchmarks/growth.py --along batch,tokens`.

Each cost is measured at several values, in turns, and a line is fitted through the logarithms of the least of each value's
times, as what disturbs a measurement only adds to it: its slope is the exponent. The
maths are the FLOPs of `fastjepa.flops` (on ranks: those that a core has to do), the bytes of `fastjepa.memory`, and for what
the host does the number of things done. What grows faster than they do, beyond TOLERANCE and the error of the fit, is flagged.
The tolerance is what a sort of 1,000 or more things adds, and a cache that no longer holds what a smaller value needs.
"""

import argparse
import contextlib
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sharded
import step
import timing
import torch
from options import config_of, numbers
from rich.console import Console
from rich.progress import track

from fastjepa.checkpoint.save import save_checkpoint
from fastjepa.checkpoint.state import TrainState
from fastjepa.cli.options import some_of
from fastjepa.config.schema import MODELS, Config
from fastjepa.data.sources import ImageFolder
from fastjepa.data.tar_shards import scan_tar
from fastjepa.errors import ConfigError, UserError
from fastjepa.loader.micro_batches import MicroBatches
from fastjepa.masks.check import check_masks
from fastjepa.masks.draw import draw_masks
from fastjepa.masks.pack import pack
from fastjepa.plan.memory import FP32_BYTES, activation_bytes, buffer_bytes, network_sizes, row_counts, state_bytes

TOLERANCE, CONFIDENCE = 0.15, 0.975
LEAST = 3  # values, so that the fit has an error
HEAD = 32  # width of an attention head along `width`
EXAMPLES = """examples:
  python benchmarks/growth.py --along batch,tokens,width,depth --threads 1
  python benchmarks/growth.py --along ranks --ranks 1,2,4 --threads 1
  python benchmarks/growth.py --along masks,packing,checkpoint,folder,shards,order --json
  python benchmarks/growth.py --device cuda --model vit_base --along batch,tokens --batch 16,32,64,128 --size 160,224,320"""


class Point(NamedTuple):
    """One value of a cost. Bytes are measured and those of the maths, where memory or a file grows too."""

    value: float
    run: Callable[[int], object]  # is timed, and called with the number of a round
    work: float  # what time should be proportional to
    nbytes: Callable[[], int] | None = None
    counted: float = 0.0


class Fit(NamedTuple):
    exponent: float
    stderr: float


def fit(values: Sequence[float], costs: Sequence[float]) -> Fit:
    """The exponent of cost ~ value ** exponent, by least squares on logarithms, and its standard error."""
    x, y = (np.log(them) - np.log(them).mean() for them in (values, costs))
    slope = (x @ y) / (x @ x)
    scatter = y - slope * x
    return Fit(float(slope), float(np.sqrt(scatter @ scatter / (len(x) - 2) / (x @ x))))


def student(freedom: int) -> float:
    """How many standard errors from a fit with so many degrees of freedom CONFIDENCE of all fits lie."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ConfigError("the fits need scipy; pip install 'fastjepa[bench]'") from error
    return float(t.ppf(CONFIDENCE, freedom))


def row(
    cost: str, quantity: str, against: str, values: Sequence[float], measured: Sequence[float], maths: Sequence[float]
) -> dict:
    """The fits of what was measured, of the maths, and of their ratio, which says how much faster than the maths it grows."""
    found, excess = fit(values, measured), fit(values, np.divide(measured, maths))
    margin = student(len(values) - 2) * excess.stderr
    return {
        "cost": cost, "quantity": quantity, "against": against, "values": list(values), "measured": list(measured),
        **found._asdict(), "of_the_maths": fit(values, maths).exponent, "excess": excess.exponent,
        "excess_stderr": excess.stderr, "too_fast": excess.exponent > max(TOLERANCE, margin),
    }  # fmt: skip


def grown(cost: str, against: str, points: Sequence[Point], rounds: int, device: torch.device) -> Iterator[dict]:
    """A row of time in ms, and one of bytes where points have them."""
    values = [point.value for point in points]
    seconds = timing.interleave({i: point.run for i, point in enumerate(points)}, rounds, device)
    milliseconds = [1000 * min(taken) for taken in seconds.values()]
    yield row(cost, "ms", against, values, milliseconds, [point.work for point in points])
    if points[0].nbytes:
        held = [point.nbytes() for point in points]
        yield row(cost, "bytes", against, values, held, [point.counted for point in points])


# A step


def along(config: Config, axis: str, value: int) -> tuple[float, Config]:
    """The config with another batch, image size, width or depth, and what the cost is fitted against."""
    if axis == "batch":
        mask = replace(config.mask, truncate_group=value)
        return value, replace(config, data=replace(config.data, batch_size=value), mask=mask)
    if axis == "tokens":
        config = replace(config, data=replace(config.data, crop_size=value))
        return float(np.prod(config.grid)), config
    meta = {"depth": {"depth": value}, "width": {"embed_dim": value, "num_heads": value // HEAD}}[axis]
    return value, replace(config, meta=replace(config.meta, **meta))


def step_point(config: Config, axis: str, value: int, device: torch.device) -> Point:
    value, config = along(config, axis, value)
    check_masks(config.mask, config.grid, config.runtime.seed, config.data.batch_size)
    works = [step.Work.draw(config, device, number) for number in range(step.DISTINCT)]
    run = step.Ours(config, device, works)
    return Point(value, run, config.data.batch_size * float(np.mean(run.flops)),
                 lambda: timing.in_fresh_process(step.peak, config, "ours", None), step_bytes(config))  # fmt: skip


def step_bytes(config: Config) -> int:
    """What a step on one device holds at its peak, as `fastjepa.memory` counts it."""
    size, rows = network_sizes(config), row_counts(config, config.micro_batch)
    held = activation_bytes(config, rows)
    parts = state_bytes(size, config.runtime.dtype, 1, 0) | buffer_bytes(size, config.runtime.dtype, 0)
    return sum(parts.values()) + held.saved + held.loss


def on_ranks(config: Config, counts: Sequence[int], rounds: int, device: torch.device) -> Iterator[dict]:
    """The same batch on every rank, with DDP: time should not grow until ranks share cores, nor the state of a rank at all."""
    cores = torch.cuda.device_count() if device.type == "cuda" else len(os.sched_getaffinity(0)) // torch.get_num_threads()
    starts = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            whole = replace(config, data=replace(config.data, batch_size=count * config.data.batch_size))
            starts[count].append(sharded.start(whole, 0, count))
    times = [min(ms for one in starts[count] for ms in one["ms"]) for count in counts]
    yield row("step", "ms", "ranks", counts, times, [max(1.0, count / max(1, cores)) for count in counts])
    held = [starts[count][0]["state_bytes"] for count in counts]
    yield row("state", "bytes", "ranks", counts, held, [1.0 for _ in counts])


# The host


def mask_points(config: Config, batches: Sequence[int]) -> Iterator[Point]:
    for batch in batches:

        def draw(number: int, batch: int = batch) -> None:
            draw_masks(config.mask, config.grid, config.runtime.seed, number, range(batch), batch)

        yield Point(batch, draw, batch)


def packing_points(config: Config, batches: Sequence[int]) -> Iterator[Point]:
    for batch in batches:
        drawn = draw_masks(config.mask, config.grid, config.runtime.seed, 0, range(batch), batch)
        yield Point(batch, lambda number, drawn=drawn: pack(*drawn), batch)


def checkpoint_points(config: Config, depths: Sequence[int], folder: Path, device: torch.device) -> Iterator[Point]:
    """Against the numbers that a checkpoint has to hold: weights, two moments and the average."""
    for depth in depths:
        _, deeper = along(config, "depth", depth)
        run = step.Ours(deeper, device, [step.Work.draw(deeper, device, 0)])
        run(0)
        parts = {"encoder": run.jepa.encoder, "predictor": run.jepa.predictor, "target_encoder": run.target_encoder}
        state, root = TrainState(0, parts, run.engine.optimizer), folder / str(depth)

        def save(number: int, state: TrainState = state, root: Path = root) -> None:
            state.step += 1
            save_checkpoint(root, state, keep_last=1)

        size = network_sizes(deeper)
        numbers = 3 * size.trained + size.encoder
        yield Point(numbers, save, numbers, lambda root=root: size_of(root), FP32_BYTES * numbers)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def folder_points(images: Sequence[int], scratch: Path) -> Iterator[Point]:
    """Start-up on a folder: images are found, sorted and labelled. In folders of 1,000, as ImageNet's are."""
    for count in images:
        root = scratch / f"folder-{count}"
        for number in range(count):
            path = root / f"{number // 1000:04d}" / f"{number:07d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        yield Point(count, lambda number, root=root: ImageFolder(root), count)


def shard_points(images: Sequence[int], scratch: Path) -> Iterator[Point]:
    """Start-up on a tar that has no index file: its headers are read."""
    for count in images:
        path = scratch / f"{count}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(count):
                tar.addfile(tarfile.TarInfo(f"{number:07d}.jpg"))
        yield Point(count, lambda number, path=path: scan_tar(path), count)


def order_points(config: Config, images: Sequence[int]) -> Iterator[Point]:
    """The first sample of a new epoch: its permutation is drawn."""
    for count in images:
        count *= 32  # of indices, not of files
        yield Point(count, lambda number, count=count: MicroBatches(config, range(count), 0, 1).samples(0, 0, 1), count)


COSTS = ("batch", "tokens", "width", "depth", "ranks", "masks", "packing", "checkpoint", "folder", "shards", "order")


def measure(options: argparse.Namespace) -> list[dict]:
    """The rows, as `--json` prints them."""
    config = to_config(options)
    device = step.start(config)
    about = {"model": config.meta.model_name, "dtype": config.runtime.dtype, "rounds": options.rounds}
    named = track(options.along, "measuring", console=Console(stderr=True), disable=not sys.stderr.isatty())
    with tempfile.TemporaryDirectory(prefix="fastjepa-bench-") as scratch:
        return [found | about for name in named for found in costs(name, config, options, device, Path(scratch))]


def costs(name: str, config: Config, options: argparse.Namespace, device: torch.device, scratch: Path) -> Iterable[dict]:
    if name == "ranks":
        return on_ranks(config, options.ranks, options.rounds, device)
    if name in ("batch", "tokens", "width", "depth"):
        values = options.size if name == "tokens" else getattr(options, name)
        points = [step_point(config, name, value, device) for value in values]
        return grown("step", name, points, options.rounds, device)
    host = {
        "masks": ("drawing masks", "images", lambda: mask_points(config, options.drawn)),
        "packing": ("packing", "images", lambda: packing_points(config, options.drawn)),
        "checkpoint": ("checkpoint", "numbers in it", lambda: checkpoint_points(config, options.depth, scratch, device)),
        "folder": ("finding files", "images", lambda: folder_points(options.images, scratch)),
        "shards": ("reading a tar's index", "images", lambda: shard_points(options.images, scratch)),
        "order": ("order of an epoch", "images", lambda: order_points(config, options.images)),
    }
    cost, against, points = host[name]
    return grown(cost, against, list(points()), options.rounds, torch.device("cpu"))


def report(rows: Iterable[dict]) -> Iterator[str]:
    """The lines that are printed without `--json`."""
    yield "cost                   of     against        from to            exponent        the maths'  above it"
    for one in rows:
        values = f"{one['values'][0]:g} to {one['values'][-1]:g}"
        yield (
            f"{one['cost']:<23}{one['quantity']:<7}{one['against']:<15}{values:<18}"
            f"{one['exponent']:6.2f} +- {one['stderr']:.2f}{one['of_the_maths']:12.2f}"
            f"{one['excess']:+9.2f} +- {one['excess_stderr']:.2f}"
            + ("  GROWS FASTER THAN THE MATHS" if one["too_fast"] else "")
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fit how time and memory grow, and flag what grows faster than the maths.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--along", type=some_of(*COSTS), default=list(COSTS), metavar="NAME,...", help=f"default {','.join(COSTS)}"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--model", default="vit_tiny", choices=tuple(MODELS), metavar="NAME", help="where it does not grow")
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument(
        "--batch", type=rising, default="4,8,16,32", metavar="N,...", help="images a step (default %(default)s)"
    )
    parser.add_argument("--size", type=rising, default="128,192,256,320", metavar="N,...", help="pixels (default %(default)s)")
    parser.add_argument("--width", type=rising, default="96,192,384,768", metavar="N,...", help="default %(default)s")
    parser.add_argument("--depth", type=rising, default="3,6,12,24", metavar="N,...", help="default %(default)s")
    parser.add_argument("--ranks", type=rising, default="1,2,4", metavar="N,...", help="default %(default)s")
    parser.add_argument(
        "--drawn", type=rising, default="64,128,256,512,1024,2048", metavar="N,...", help="images whose masks are drawn"
    )
    parser.add_argument(
        "--images", type=rising, default="1000,2000,4000,8000,16000,32000", metavar="N,...", help="of a data set"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each value (default 5)")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any further key of the config")
    return parser.parse_intermixed_args(argv)


def rising(text: str) -> list[int]:
    found = sorted(set(numbers(text)))
    if len(found) < LEAST or found[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a fit needs at least {LEAST} different numbers above 0")
    return found


def to_config(options: argparse.Namespace) -> Config:
    """What stays as it is: 8 images of 128 pixels, unless the overrides say otherwise."""
    keys = {
        "runtime.device": options.device,
        "runtime.dtype": options.dtype,
        "meta.model_name": options.model,
        "data.batch_size": 8,
        "data.crop_size": 128,
        "mask.truncate_group": 8,
        "mask.min_keep": 4,
        "runtime.threads": options.threads,
    }
    return config_of(keys, options.overrides)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        if options.rounds < 1:
            raise ConfigError(f"--rounds {options.rounds}: time at least one round")
        with contextlib.redirect_stdout(sys.stderr):
            rows = measure(options)
    except (UserError, OSError) as error:
        print(f"benchmarks/growth.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(rows) if options.json else "\n".join(report(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
