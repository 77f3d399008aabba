"""How many images a second come, by source, loader and worker processes: `python benchmarks/data.py --workers 0,1,2`.

Ours (`data.loader: torch` and `dali`), torchvision's ImageFolder + RandomResizedCrop + DataLoader, and webdataset's own
loader on the same shards take turns in one process. Each turn opens a loader, takes what it made ahead and then counts
for `--seconds`: what is counted was decoded in that time. Files are in the page cache after the first round, so no disk
is measured. All hand over uint8 batches on the device; ours also draw their masks, which the others have not.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timing
import torch
from loaders import OURS, RIVALS, Contender, Sets, open_batches, prepare, set_for
from options import config_of, numbers
from PIL import Image, ImageOps
from timing import Spread
from torch import Tensor
from torchvision.transforms.v2.functional import hflip, pil_to_tensor, resized_crop

from fastjepa.cli.options import some_of
from fastjepa.config.schema import MODELS, Config
from fastjepa.data.decode_dali import dali_installed, require_dali
from fastjepa.data.sources import open_source
from fastjepa.engine.average import Average
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.schedule import Schedule
from fastjepa.errors import UserError
from fastjepa.loader.batch import Batch
from fastjepa.loader.loader import Loader
from fastjepa.loader.micro_batches import EncodedBatches
from fastjepa.ranks.world import World, join_world
from fastjepa.run.build import apply_process_settings, build_networks
from fastjepa.run.step import take_step

VERSIONS = "torch", "torchvision", "pillow"
FAR = 8  # of 255: a difference that can be seen
LEAST_STEPS = 4  # that a turn under the training step measures
EXAMPLES = """examples:
  python benchmarks/data.py --data /data/imagenet/train --workers 0,1,2
  python benchmarks/data.py --under-step --batch 16 --workers 1 --loaders torch,dali
  python benchmarks/data.py --difference --data /data/imagenet/train --images 1000
  python benchmarks/data.py --device cuda --workers 8,16 --batch 128 data.decode_threads=8 --json"""


# Each is called with the number of a round and keeps its reading of it


class Rate:
    """images/s; `turn` batches, one of each worker, are the smallest piece that is counted."""

    def __init__(
        self, opened: Callable[[], AbstractContextManager], turn: int, ahead: int, seconds: float, device: torch.device
    ):
        self.opened, self.turn, self.ahead, self.seconds, self.device = opened, turn, ahead, seconds, device
        self.readings: dict[int, float] = {}

    def __call__(self, number: int) -> None:
        with self.opened() as batches:
            for _ in range(self.turn * (2 * self.ahead + 1)):  # made ahead by the workers, and by DALI
                next(batches)
            timing.synchronize(self.device)
            images, start = 0, time.perf_counter()
            while time.perf_counter() - start < self.seconds:
                images += sum(len(next(batches)) for _ in range(self.turn))
            timing.synchronize(self.device)
            self.readings[number] = images / (time.perf_counter() - start)


class Turn(NamedTuple):
    """One turn of a training step: means over its steps, in seconds."""

    step: float
    waited: float  # of it, for batches


class UnderStep:
    """How long a training step waited for its batches; one step at a time, so that every wait is one of the device.

    A run does not wait for the device after each step, and hides on a GPU what is shown here: this is an upper bound.
    """

    def __init__(self, step: Callable[[Iterable], object], opened: Callable, seconds: float, device: torch.device):
        self.step, self.opened, self.seconds, self.device = step, opened, seconds, device
        self.readings: dict[int, Turn] = {}

    def __call__(self, number: int) -> None:
        with self.opened() as steps:
            self.step(next(steps))
            timing.synchronize(self.device)
            waits, start = [], time.perf_counter()
            for taken in itertools.count(1):
                self.step(waited(next(steps), waits))
                timing.synchronize(self.device)
                elapsed = time.perf_counter() - start
                if taken >= LEAST_STEPS and elapsed >= self.seconds:
                    break
            self.readings[number] = Turn(elapsed / taken, sum(waits) / taken)


def waited(batches: Iterable, waits: list[float]) -> Iterator:
    """The batches, and in `waits` the seconds until each was there."""
    batches = iter(batches)
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        waits.append(time.perf_counter() - start)
        if batch is None:
            return
        yield batch


class Training:
    """The trainer's own step."""

    def __init__(self, config: Config, device: torch.device):
        self.config = config
        self.jepa, self.target_encoder = build_networks(config, device)
        self.engine = PlainEngine(self.jepa, micro_batches=config.data.batch_size // config.micro_batch)
        self.average = Average(self.target_encoder, self.jepa.encoder)
        self.now = Schedule(config.optimization, steps_per_epoch=1000)(0)

    def __call__(self, batches: Iterable[Batch]) -> None:
        take_step(self.engine, self.average, batches, self.now, self.config)


@contextlib.contextmanager
def steps_of(one: Contender, config: Config, sets: Sets, device: torch.device) -> Iterator[Iterator[Iterable[Batch]]]:
    config = set_for(one, config, sets)
    with Loader(config, open_source(config.data), World(0, 0, 1, device), 0) as loader:
        yield (loader.micro_batches(step) for step in itertools.count())


def contenders(options: argparse.Namespace) -> tuple[list[Contender], list[dict[str, str]]]:
    """Those asked for that can run here, and why the others cannot."""
    asked = [Contender(source, loader, workers) for workers in options.workers for source in options.sources
             for loader in options.loaders if RIVALS.get(loader, source) == source]  # fmt: skip
    absent = [name for name, there in (("dali", dali_installed()), ("webdataset", find_spec("webdataset"))) if not there]
    missing = [{"what": str(one), "reason": f"{one.loader} is not installed"} for one in asked if one.loader in absent]
    return [one for one in asked if one.loader not in absent], missing


def alone(entrants: Sequence[Contender], config: Config, sets: Sets, options: argparse.Namespace, device) -> list[dict]:
    def rate(one: Contender) -> Rate:
        opened = functools.partial(open_batches, one, config, sets, device)
        return Rate(opened, max(1, one.workers), config.data.prefetch, options.seconds, device)

    runs = {one: rate(one) for one in entrants}
    timing.interleave(runs, options.rounds, device)
    rates = {one: [run.readings[number] for number in range(options.rounds)] for one, run in runs.items()}
    found = []
    for one in entrants:
        result = one._asdict() | {"images_per_s": Spread.of(rates[one])._asdict()}
        rival = Contender("folder", "torchvision", one.workers)
        if rival in rates and one != rival:
            seconds = [[1 / rate for rate in rates[each]] for each in (one, rival)]
            result["ratio_to_torchvision"] = timing.ratio(*seconds)._asdict()
        found.append(result)
    return found


def under_step(entrants: Sequence[Contender], config: Config, sets: Sets, options: argparse.Namespace, device) -> list[dict]:
    """Of our loaders; beside them the same step on batches that are already there."""
    entrants = [one for one in entrants if one.loader in OURS]
    if not entrants:
        raise UserError("--under-step: only our loaders feed a training step; give --loaders torch, dali or both")
    training = Training(config, device)
    with steps_of(Contender(entrants[0].source, "torch", 0), config, sets, device) as steps:
        held = [list(batches) for batches in itertools.islice(steps, LEAST_STEPS)]
    opened = {one: lambda one=one: steps_of(one, config, sets, device) for one in entrants}
    opened["none"] = lambda: contextlib.nullcontext(itertools.cycle(held))
    runs = {one: UnderStep(training, how, options.seconds, device) for one, how in opened.items()}
    timing.interleave(runs, options.rounds, device)
    turns = {one: [run.readings[number] for number in range(options.rounds)] for one, run in runs.items()}
    without = [turn.step for turn in turns["none"]]
    return [one._asdict() | {
        "dtype": config.runtime.dtype,
        "step_ms": Spread.of([1000 * turn.step for turn in turns[one]])._asdict(),
        "waited_ms": Spread.of([1000 * turn.waited for turn in turns[one]])._asdict(),
        "waited_share": Spread.of([turn.waited / turn.step for turn in turns[one]])._asdict(),
        "times_the_step_without": timing.ratio(without, [turn.step for turn in turns[one]])._asdict(),
    } for one in entrants]  # fmt: skip


def difference(config: Config, sets: Sets, device: torch.device) -> dict[str, float]:
    """DALI against Pillow and torchvision's `resized_crop` on the same boxes, over one epoch."""
    require_dali()
    config = set_for(Contender("folder", "dali", 0), config, sets)
    source, total, far, values = open_source(config.data), 0, 0, 0
    boxed, per_step = EncodedBatches(config, source, 0, 1), config.data.batch_size // config.micro_batch
    with Loader(config, source, World(0, 0, 1, device), 0) as loader:
        for step in range(loader.steps_per_epoch):
            for micro, batch in enumerate(loader.micro_batches(step)):
                theirs = [seen(*view, config) for view in zip(*boxed[step * per_step + micro].images.arrays(), strict=True)]
                off = (batch.images.cpu().int() - torch.stack(theirs).int()).abs()
                total, far, values = total + int(off.sum()), far + int((off > FAR).sum()), values + off.numel()
    views = loader.steps_per_epoch * config.data.batch_size
    return {"views": views, "mean_of_255": total / values, "share_past_8": far / values}


def seen(file: np.ndarray, start: np.ndarray, shape: np.ndarray, flip: int, config: Config) -> Tensor:
    """(C, H, W) uint8, as torchvision shows a box of a file."""
    image = ImageOps.exif_transpose(Image.open(BytesIO(file))).convert("L" if config.data.channels == 1 else "RGB")
    (left, top), (width, height) = start.tolist(), shape.tolist()
    view = resized_crop(pil_to_tensor(image), top, left, height, width, list(config.image_size), antialias=True)
    return hflip(view) if flip else view


def measure(options: argparse.Namespace) -> dict:
    """The result, with the keys that `--json` prints."""
    config = to_config(options)
    device = join_world(config.runtime.device).device
    apply_process_settings(config)
    entrants, missing = contenders(options)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about = {"machine": machine, "device": device.type, "cores": len(os.sched_getaffinity(0)), "rounds": options.rounds,
             "seconds": options.seconds, "batch": config.micro_batch, "size": config.image_size,
             "threads": torch.get_num_threads(), "versions": {name: version(name) for name in VERSIONS}}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="fastjepa-bench-") as scratch:
        sets = prepare(options.data, options.images, 2 * max(2, *options.workers), Path(scratch))
        if sets.about["images"] < config.data.batch_size:
            raise UserError(f"--images: {sets.about['images']} images are fewer than a batch of {config.data.batch_size}")
        result = {**about, "data": sets.about, "not_measured": missing}
        for name, part in (("alone", alone), ("under_step", under_step)):
            if getattr(options, name):
                result[name] = part(entrants, config, sets, options, device)
        if options.difference:
            result["difference"] = difference(config, sets, device)
    return result


def report(result: dict) -> Iterator[str]:
    """The lines that are printed without `--json`."""
    data, size = result["data"], " x ".join(map(str, result["size"]))
    yield f"{data['images']} images of {data['mean_bytes'] / 1000:.0f} kB ({data['origin']}) to {size}, batch {result['batch']}"
    where = f"{result['machine']}, {result['cores']} cores, {result['device']}"
    yield f"{where}; {result['rounds']} rounds of {result['seconds']:g} s, median (p20 to p80)"
    for one in result.get("alone", ()):
        yield f"{title(one)}: {spread(one['images_per_s'], '.0f')} images/s" + (
            f", {spread(one['ratio_to_torchvision'], '.2f')} times torchvision's" if "ratio_to_torchvision" in one else ""
        )
    for one in result.get("under_step", ()):
        yield f"{title(one)}, under a step: waited {spread(one['waited_share'], '.2%')} of the time"
        yield f"  {spread(one['waited_ms'], '.2f')} ms of a step of {spread(one['step_ms'], '.0f')} ms, which is "
        yield f"  {spread(one['times_the_step_without'], '.2f')} times that of a step whose batches are there already"
    if "difference" in result:
        yield "DALI and torchvision differ by {mean_of_255:.3f}/255 on average over {views} views, {share_past_8:.4%} of the " \
              "values by more than 8/255".format(**result["difference"])  # fmt: skip
    for one in result["not_measured"]:
        yield f"{one['what']}: not measured: {one['reason']}"


def title(one: dict) -> str:
    return str(Contender(one["source"], one["loader"], one["workers"]))


def spread(found: dict[str, float], form: str) -> str:
    return f"{found['median']:{form}} ({found['p20']:{form}} to {found['p80']:{form}})"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time our loaders, torchvision's and webdataset's on the same images, in turns.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--alone", action="store_true", help="images/s of the loaders by themselves (what is done by default)")
    parser.add_argument("--under-step", action="store_true", help="how long a training step waits for our loaders")
    parser.add_argument("--difference", action="store_true", help="how far DALI's pixels are from torchvision's, same boxes")
    parser.add_argument(
        "--data", metavar="DIR", help="whatever data.source takes (default: JPEGs made in a temporary directory)"
    )
    parser.add_argument("--images", type=int, default=512, help="taken of it, evenly spaced, and copied (default 512)")
    parser.add_argument("--workers", type=numbers, default="0,1,2", metavar="N,...", help="loader processes (default 0,1,2)")
    parser.add_argument("--sources", type=some_of("folder", "shards"), default="folder,shards", metavar="NAME,...")
    loaders = ",".join([*OURS, *RIVALS])
    parser.add_argument(
        "--loaders", type=some_of(*OURS, *RIVALS), default=loaders, metavar="NAME,...", help=f"default {loaders}"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=32, help="images a batch (default 32)")
    parser.add_argument("--size", type=int, default=224, help="side of a view in pixels (default 224)")
    parser.add_argument(
        "--model", default="vit_small", choices=tuple(MODELS), metavar="NAME", help="of the step: vit_small, ..."
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="of the step")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--seconds", type=float, default=3, help="counted in each turn (default 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any further key of the config")
    options = parser.parse_intermixed_args(argv)
    options.alone |= not (options.under_step or options.difference)
    return options


def to_config(options: argparse.Namespace) -> Config:
    keys = {
        "runtime.device": options.device,
        "runtime.dtype": options.dtype,
        "meta.model_name": options.model,
        "data.batch_size": options.batch,
        "mask.truncate_group": options.batch,
        "data.crop_size": options.size,
    }
    return config_of(keys, options.overrides)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        for option in ("images", "batch", "rounds", "seconds"):
            if getattr(options, option) <= 0:
                raise UserError(f"--{option} {getattr(options, option)}: give a number above 0")
        with contextlib.redirect_stdout(sys.stderr):
            result = measure(options)
    except UserError as error:
        print(f"benchmarks/data.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result) if options.json else "\n".join(report(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
