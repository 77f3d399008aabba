"""Images a second by source, loader and worker processes: `python benchmarks/data.py --workers 0,1,2`.

Our loader (`data.loader: torch` and `dali`), torchvision's ImageFolder + RandomResizedCrop + DataLoader, webdataset's own
loader on the same shards, and SPDL's threads, over the same ImageFolder (`spdl`) and with its own decoder (`spdl_ffmpeg`),
take turns in one process. Each turn opens a loader, takes what it made ahead and then counts for `--seconds`, so that what is
counted was decoded in that time. Files are in the page cache after the first round: no disk is measured. All hand over uint8
batches on the device; ours also draws its masks, which the others have not. How long a training step waits for its batches is
in `python benchmarks/step.py --breakdown`.
"""

import argparse
import contextlib
import functools
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timing
import torch
from options import config_of, int_list, make_parser, run_script
from photographs import SIZE, photographs
from timing import Spread
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, PILToTensor, RandomResizedCrop

from fastjepa.cli.options import positive_int, some_of
from fastjepa.config.schema import Config
from fastjepa.data.decode_dali import dali_installed
from fastjepa.data.decode_pillow import MAX_PIXELS
from fastjepa.data.endings import image_endings
from fastjepa.data.prepare.check_images import MEGA, judge_image
from fastjepa.data.prepare.write_shards import ShardRequest, write_shards
from fastjepa.data.sources import IdxPair, open_source
from fastjepa.errors import UserError
from fastjepa.loader.loader import Loader
from fastjepa.ranks.world import World, join_world
from fastjepa.run.build import apply_process_settings

EXAMPLES = """examples:
  python benchmarks/data.py --data /data/imagenet/train --workers 0,1,2
  python benchmarks/data.py --device cuda --workers 8,16 --batch 128 data.decode_threads=8 --json"""


class Contender(NamedTuple):
    source: str  # folder or shards
    loader: str
    workers: int

    def __str__(self) -> str:
        return f"{self.loader}, {self.source}, {self.workers} workers"


class Sets(NamedTuple):
    """The same images as files and as shards."""

    folder: Path
    shards: Path
    about: dict  # origin, number and mean size of the images, for the result


def prepare_sets(data: str | None, images: int, shards: int, scratch: Path) -> Sets:
    """Copy `images` readable ones of a source, evenly spaced, or make as many here; and write `shards` tars of the same."""
    sets = Sets(scratch / "folder", scratch / "shards", {})
    (sets.folder / "all").mkdir(parents=True)
    named = spaced_images(data, images) if data else (("made.jpg", raw) for raw in photographs(images))
    for number, (name, raw) in enumerate(named):
        suffix = Path(name).suffix.lower()
        (sets.folder / "all" / f"{number:06d}{suffix if suffix in image_endings() else '.jpg'}").write_bytes(raw)
    source = open_source(sets.folder)
    total = sum(path.stat().st_size for path in sets.folder.rglob("*.*"))
    write_shards(source, sets.shards, {"path": data or "made", "split": "train"}, ShardRequest(-(-total // shards)))
    origin = data or f"made here: {SIZE[0]}x{SIZE[1]} JPEGs of waves, edges and grain"
    sets.about.update(origin=origin, images=len(source), mean_bytes=round(total / len(source)))
    return sets


def spaced_images(where: str, images: int) -> Iterator[tuple[str, bytes]]:
    source = open_source(where)
    if isinstance(source, IdxPair):
        raise UserError(f"--data {where}: idx files need no decoding; give image files, shards or Parquet files")
    for i in np.linspace(0, len(source) - 1, min(images, len(source))).astype(int).tolist():
        if isinstance(judge_image(source, i, MAX_PIXELS / MEGA), tuple):  # torchvision stops at a bad file
            yield source.name(i), source.read(i)


# Each loader is a context that gives endless (B, C, H, W) uint8 batches on the device, and leaves no process behind
@contextlib.contextmanager
def our_batches(one: Contender, config: Config, sets: Sets, device: torch.device) -> Iterator[Iterator[Tensor]]:
    source = sets.folder if one.source == "folder" else sets.shards
    config = replace(config, data=replace(config.data, source=str(source), loader=one.loader, num_workers=one.workers))
    with Loader(config, open_source(config.data.address), World(0, 0, 1, device), 0) as loader:
        yield (batch.images for step in itertools.count() for batch in loader.micro_batches(step))


@contextlib.contextmanager
def torchvision_batches(one: Contender, config: Config, sets: Sets, device: torch.device) -> Iterator[Iterator[Tensor]]:
    dataset = ImageFolder(str(sets.folder), random_crops(config))
    order = BatchSampler(RandomSampler(dataset, num_samples=2**40), config.micro_batch, drop_last=True)
    with torch_loader(dataset, one, config, device, batch_sampler=order) as batches:
        yield (images.to(device, non_blocking=True) for images, _ in batches)


@contextlib.contextmanager
def webdataset_batches(one: Contender, config: Config, sets: Sets, device: torch.device) -> Iterator[Iterator[Tensor]]:
    from webdataset import WebDataset

    shards = sorted(map(str, sets.shards.glob("*.tar")))
    samples = WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(100).decode("pil")
    fields = ";".join(ending.removeprefix(".") for ending in sorted(image_endings()))
    dataset = samples.to_tuple(fields).map_tuple(random_crops(config)).batched(config.micro_batch, partial=False).repeat()
    with torch_loader(dataset, one, config, device, batch_size=None) as batches:
        yield (images.to(device, non_blocking=True) for (images,) in batches)


@contextlib.contextmanager
def spdl_batches(one: Contender, config: Config, sets: Sets, device: torch.device) -> Iterator[Iterator[Tensor]]:
    """Open SPDL's pipeline of threads as its page on migrating from PyTorch has it, `spdl_ffmpeg` with its own decoder."""
    from spdl.pipeline import PipelineBuilder

    if one.loader == "spdl":
        dataset, collate = ImageFolder(str(sets.folder), random_crops(config)), default_collate
    else:
        dataset, collate = ImageFolder(str(sets.folder), loader=functools.partial(ffmpeg_crop, config)), ffmpeg_batch
    order = iter(RandomSampler(dataset, num_samples=2**40))
    steps = PipelineBuilder().add_source(order).pipe(dataset.__getitem__, concurrency=one.workers)
    pipeline = steps.aggregate(config.micro_batch).pipe(collate).add_sink(config.data.prefetch).build(num_threads=one.workers)
    with pipeline.auto_stop():
        yield (images.to(device, non_blocking=True) for images, _ in pipeline)


def ffmpeg_crop(config: Config, path: str) -> Any:
    """Decode the random crop that torchvision's transform would take of a file, into frames of SPDL."""
    import spdl.io

    (height, width), packets = config.image_size, spdl.io.demux_image(path)
    whole, ratios = torch.empty(1, packets.codec.height, packets.codec.width), (3 / 4, 4 / 3)
    top, left, h, w = RandomResizedCrop.get_params(whole, config.data.crop_scale, ratios)
    return spdl.io.decode_packets(packets, filter_desc=f"crop={w}:{h}:{left}:{top},scale={width}:{height},format=rgb24")


def ffmpeg_batch(items: list[tuple[Any, int]]) -> tuple[Tensor, tuple[int, ...]]:
    import spdl.io

    frames, classes = zip(*items, strict=True)
    return spdl.io.to_torch(spdl.io.convert_frames(frames)).permute(0, 3, 1, 2), classes


def random_crops(config: Config) -> Compose:
    return Compose([RandomResizedCrop(config.image_size, scale=config.data.crop_scale), PILToTensor()])


@contextlib.contextmanager
def torch_loader(dataset, one: Contender, config: Config, device: torch.device, **batching) -> Iterator[Iterator]:
    """Open torch's own DataLoader, with the settings of ours."""
    ahead = config.data.prefetch if one.workers else None
    pinned = device.type == "cuda" and config.data.pin_mem
    batches = iter(DataLoader(dataset, num_workers=one.workers, prefetch_factor=ahead, pin_memory=pinned, **batching))
    try:
        yield batches
    finally:
        getattr(batches, "_shutdown_workers", int)()  # the next turn must find the machine as this one found it


LOADERS = {  # name: how it is opened, and the sources that it reads
    "torch": (our_batches, ("folder", "shards")),
    "dali": (our_batches, ("folder", "shards")),
    "torchvision": (torchvision_batches, ("folder",)),
    "webdataset": (webdataset_batches, ("shards",)),
    "spdl": (spdl_batches, ("folder",)),
    "spdl_ffmpeg": (spdl_batches, ("folder",)),
}


def reason_against(one: Contender) -> str:
    """Say why a contender cannot be measured; an empty text where it can."""
    package = one.loader.partition("_")[0]
    if package in ("webdataset", "spdl") and find_spec(package) is None or package == "dali" and not dali_installed():
        return f"{package} is not installed"
    if package == "spdl" and not one.workers:
        return "it has one thread at least"
    if one.loader == "spdl_ffmpeg":
        import spdl.io

        try:
            spdl.io.utils.get_ffmpeg_versions()
        except RuntimeError:
            return "spdl.io finds no FFmpeg libraries; apt-get install libavfilter8 libavdevice59, or your system's"
    return ""


class LoaderRate:
    """Images a second of a loader; call it with the number of a round, whose reading it keeps."""

    def __init__(
        self, opened: Callable[[], AbstractContextManager], turn: int, ahead: int, seconds: float, device: torch.device
    ):
        """Count by `turn` batches, one of each worker; `ahead` of them are made before they are asked for."""
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


def measure_loaders(
    entrants: list[Contender], config: Config, sets: Sets, options: argparse.Namespace, device: torch.device
) -> list[dict]:
    """Return a row for every contender; those beside torchvision's loader with as many workers have a ratio to it."""
    runs = {}
    for one in entrants:
        opened = functools.partial(LOADERS[one.loader][0], one, config, sets, device)
        runs[one] = LoaderRate(opened, max(1, one.workers), config.data.prefetch, options.seconds, device)
    timing.interleave(runs, options.rounds, device)
    rates = {one: [run.readings[number] for number in range(options.rounds)] for one, run in runs.items()}
    rows = []
    for one in entrants:
        row = one._asdict() | {"images_per_s": Spread.of(rates[one])._asdict()}
        rival = Contender("folder", "torchvision", one.workers)
        if rival in rates and one != rival:
            seconds = [[1 / rate for rate in rates[each]] for each in (one, rival)]
            row["ratio_to_torchvision"] = timing.paired_ratio(*seconds)._asdict()
        rows.append(row)
    return rows


def measure_asked(options: argparse.Namespace) -> dict:
    config = to_config(options)
    device = join_world(config.runtime.device).device
    apply_process_settings(config)
    asked = [Contender(source, loader, workers) for workers in options.workers for source in options.sources
             for loader in options.loaders if source in LOADERS[loader][1]]  # fmt: skip
    gaps = [{"what": str(one), "reason": reason} for one in asked if (reason := reason_against(one))]
    entrants = [one for one in asked if not reason_against(one)]
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        gaps.append({"what": "threads without Python's lock", "reason": "this Python has it; run this with a python3.14t"})
    with tempfile.TemporaryDirectory(prefix="fastjepa-bench-") as scratch:
        sets = prepare_sets(options.data, options.images, 2 * max(2, *options.workers), Path(scratch))
        if sets.about["images"] < config.data.batch_size:
            raise UserError(f"--images: {sets.about['images']} images are fewer than a batch of {config.data.batch_size}")
        return {"rows": measure_loaders(entrants, config, sets, options, device), "not_measured": gaps, "data": sets.about}


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    about = "Time our loaders, torchvision's, webdataset's and SPDL's on the same images, in turns."
    parser = make_parser(about, EXAMPLES, device="auto", batch=32, size=224, rounds=5)
    parser.add_argument("--data", metavar="DIR", help="whatever data.source takes (default: JPEGs made here)")
    parser.add_argument("--images", type=positive_int, default=512, help="taken of it, evenly spaced, and copied (default 512)")
    parser.add_argument("--workers", type=int_list, default="0,1,2", metavar="N,...", help="loader processes (default 0,1,2)")
    parser.add_argument("--sources", type=some_of("folder", "shards"), default="folder,shards", metavar="NAME,...")
    names = ",".join(LOADERS)
    parser.add_argument("--loaders", type=some_of(*LOADERS), default=names, metavar="NAME,...", help=f"default {names}")
    parser.add_argument("--seconds", type=float, default=3, help="counted in each turn (default 3)")
    return parser.parse_intermixed_args(argv)


def to_config(options: argparse.Namespace) -> Config:
    return config_of(options, mask__truncate_group=options.batch)


def main(argv: list[str] | None = None) -> int:
    return run_script("data.py", parse_options(argv), measure_asked)


if __name__ == "__main__":
    sys.exit(main())
