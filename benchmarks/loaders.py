"""What benchmarks/data.py compares: our loader, torchvision's and webdataset's, on the same images as files and as shards.

Each is a context that gives endless (b, C, H, W) uint8 batches on the device, and leaves no process behind.
"""

import contextlib
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from photographs import SIZE, photographs
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, PILToTensor, RandomResizedCrop

from fastjepa.config.schema import Config
from fastjepa.data.decode_pillow import MAX_PIXELS
from fastjepa.data.prepare.check_images import MEGA, judge_image
from fastjepa.data.prepare.write_shards import ShardRequest, write_shards
from fastjepa.data.sources import IdxPair, open_source
from fastjepa.data.tar_shards import ENDINGS
from fastjepa.errors import ConfigError
from fastjepa.loader.loader import Loader
from fastjepa.ranks.world import World

OURS, RIVALS = ("torch", "dali"), {"torchvision": "folder", "webdataset": "shards"}  # a rival reads one kind of source


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
    about: dict  # what the result says of them


def prepare(data: str | None, images: int, shards: int, scratch: Path) -> Sets:
    """`images` of them copied from a source, evenly spaced in it and readable, or made here; and `shards` tars of the same."""
    sets = Sets(scratch / "folder", scratch / "shards", {})
    (sets.folder / "all").mkdir(parents=True)
    named = copied(data, images) if data else (("made.jpg", raw) for raw in photographs(images))
    for number, (name, raw) in enumerate(named):
        suffix = Path(name).suffix.lower()
        (sets.folder / "all" / f"{number:06d}{suffix if suffix in ENDINGS else '.jpg'}").write_bytes(raw)
    source = open_source(sets.folder)
    total = sum(path.stat().st_size for path in sets.folder.rglob("*.*"))
    write_shards(source, sets.shards, {"path": data or "made", "split": "train"}, ShardRequest(-(-total // shards)))
    origin = data or f"made here: {SIZE[0]}x{SIZE[1]} JPEGs of waves, edges and grain"
    sets.about.update(origin=origin, images=len(source), mean_bytes=round(total / len(source)))
    return sets


def copied(where: str, images: int) -> Iterator[tuple[str, bytes]]:
    source = open_source(where)
    if isinstance(source, IdxPair):
        raise ConfigError(f"--data {where}: idx files need no decoding; give image files, shards or Parquet files")
    for i in np.linspace(0, len(source) - 1, min(images, len(source))).astype(int).tolist():
        if isinstance(judge_image(source, i, MAX_PIXELS / MEGA), tuple):  # torchvision stops at a bad file
            yield source.name(i), source.read(i)


def open_batches(one: Contender, config: Config, sets: Sets, device: torch.device) -> AbstractContextManager[Iterator[Tensor]]:
    how = {"torchvision": torchvision, "webdataset": webdataset}.get(one.loader, ours)
    return how(one, config, sets, device)


def set_for(one: Contender, config: Config, sets: Sets) -> Config:
    """The config that makes our loader this contender."""
    source = sets.folder if one.source == "folder" else sets.shards
    return replace(config, data=replace(config.data, source=str(source), loader=one.loader, num_workers=one.workers))


@contextlib.contextmanager
def ours(one: Contender, config: Config, sets: Sets, device: torch.device) -> Iterator[Iterator[Tensor]]:
    config = set_for(one, config, sets)
    with Loader(config, open_source(config.data), World(0, 0, 1, device), 0) as loader:
        yield (batch.images for step in itertools.count() for batch in loader.micro_batches(step))


class AnyFolder(ImageFolder):
    """torchvision's, of a folder without classes."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return ["."], {".": 0}


@contextlib.contextmanager
def torchvision(one: Contender, config: Config, sets: Sets, device: torch.device) -> Iterator[Iterator[Tensor]]:
    dataset = AnyFolder(str(sets.folder), transform(config))
    order = BatchSampler(RandomSampler(dataset, num_samples=2**40), config.micro_batch, drop_last=True)
    with running(dataset, one, config, device, batch_sampler=order) as batches:
        yield (images.to(device, non_blocking=True) for images, _ in batches)


@contextlib.contextmanager
def webdataset(one: Contender, config: Config, sets: Sets, device: torch.device) -> Iterator[Iterator[Tensor]]:
    from webdataset import WebDataset

    shards = sorted(map(str, sets.shards.glob("*.tar")))
    samples = WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(100).decode("pil")
    fields = ";".join(ending.removeprefix(".") for ending in sorted(ENDINGS))
    dataset = samples.to_tuple(fields).map_tuple(transform(config)).batched(config.micro_batch, partial=False).repeat()
    with running(dataset, one, config, device, batch_size=None) as batches:
        yield (images.to(device, non_blocking=True) for (images,) in batches)


def transform(config: Config) -> Compose:
    return Compose([RandomResizedCrop(config.image_size, scale=config.data.crop_scale), PILToTensor()])


@contextlib.contextmanager
def running(dataset, one: Contender, config: Config, device: torch.device, **batching) -> Iterator[Iterator]:
    """torch's own DataLoader, with the settings of ours."""
    ahead = config.data.prefetch if one.workers else None
    pinned = device.type == "cuda" and config.data.pin_mem
    batches = iter(DataLoader(dataset, num_workers=one.workers, prefetch_factor=ahead, pin_memory=pinned, **batching))
    try:
        yield batches
    finally:
        getattr(batches, "_shutdown_workers", int)()  # the next turn must find the machine as this one found it
