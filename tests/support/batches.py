"""Batches of a toy loader: settings, what is loaded, and whether two are the same."""

from pathlib import Path

import torch

from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import Config
from fastjepa.data.sources import open_source
from fastjepa.loader.batch import Batch
from fastjepa.loader.loader import Loader
from fastjepa.ranks.world import World

CPU = torch.device("cpu")


def settings(source: Path | str | None = None, micro_batch: int | None = None, seed: int = 5, **keys) -> Config:
    """Batches of 4 crops of 32 pixels, an 8x8 grid of patches, no worker processes."""
    keys = {"batch_size": 4, "crop_size": 32, "num_workers": 0, "loader": "torch", "source": source and str(source)} | keys
    mask = {"patch_size": 4, "min_keep": 2, "truncate_group": 4}
    return config_from_dict({"data": keys, "mask": mask, "runtime": {"micro_batch": micro_batch, "seed": seed}})


def load(setting: Config, steps: range, rank: int = 0, world: int = 1, stop: int | None = None) -> list[list[Batch]]:
    """The micro-batches of each step."""
    with Loader(setting, open_source(setting.data.address), World(rank, 0, world, CPU), steps.start, stop) as loader:
        return [list(loader.micro_batches(step)) for step in steps]


def same_batch(a: Batch, b: Batch) -> bool:
    packed = [(x.idx, x.cu_seqlens) for batch in (a, b) for x in (batch.context, batch.target, batch.blocks.sequences)]
    masks_equal = all(torch.equal(x, y) for p, q in zip(packed[:3], packed[3:], strict=True) for x, y in zip(p, q, strict=True))
    return torch.equal(a.images, b.images) and masks_equal and a.bad == b.bad
