"""What an evaluation is of: the encoders of one checkpoint, and the training and test images of one data set."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastjepa.checkpoint.directory import find_checkpoint
from fastjepa.checkpoint.state import read_state
from fastjepa.config.schema import Config
from fastjepa.data.prepare.catalog import data_dir
from fastjepa.data.prepare.processes import console
from fastjepa.data.sources import Source, open_source
from fastjepa.errors import CheckpointError, ConfigError
from fastjepa.evals.augment import Augment
from fastjepa.evals.cache import cached_features, images_fingerprint, weights_fingerprint
from fastjepa.evals.features import Layers, extract_features, raw_pixels
from fastjepa.evals.images import EvalImages
from fastjepa.evals.scoring import TEST_DRAW, TRAIN_DRAW, Features, subset
from fastjepa.files import write_atomic
from fastjepa.ranks.world import join_world
from fastjepa.run.directory import run_directory
from fastjepa.weights.encoders import Which, check_encoder_input, load_run_encoder, read_config

Inputs = Which | Literal["pixels"]
LARGEST_RAW_SIDE, RAW_SIZE = (
    64,
    (32, 32),
)  # raw pixels of images above SMALL a side are taken at TINY: a probe cannot hold 150,000 of them


@dataclass(frozen=True)
class Split:
    """The images of one split that an evaluation uses."""

    data: str
    name: str
    source: Source
    rows: np.ndarray  # rising indices into source

    @property
    def key(self) -> dict[str, Any]:
        """What a cache has to know of the images."""
        images = images_fingerprint(self.source, self.rows)
        return {"data": self.data, "split": self.name, "count": len(self.rows), "images": images}


@dataclass(frozen=True)
class Subject:
    """A run to evaluate: its config, where it lies, how and where its encoders run, where features are kept."""

    path: Path
    config: Config
    device: torch.device
    cache: Path | None  # the folder of features; its parent holds the unfinished work of probes that train
    size: tuple[int, int]  # (H, W) the images are brought to

    @property
    def home(self) -> Path | None:
        """Its run directory; None for weights that lie in none."""
        home = run_directory(self.path)
        return home if (home / "config.yaml").is_file() else None

    @property
    def dtype(self) -> torch.dtype:
        """What the encoder computes in: the run's dtype on a GPU, bf16 where it names none; fp32 on a CPU."""
        low = self.device.type == "cuda" and self.config.runtime.dtype != "fp32"
        return torch.bfloat16 if low else torch.float32

    def encoder(self, which: Which, split: Split | None = None) -> nn.Module:
        """One of its encoders, frozen, on the CPU; ConfigError when it cannot take images of this size.

        Grey images are repeated for an encoder of three channels; where images of `split` lose their colours, it is said.
        """
        encoder = load_run_encoder(self.path, which, self.config)
        check_encoder_input(encoder, self.size, self.config.data.channels)
        if split is not None and self.config.data.channels == 1:
            first = EvalImages(split.source, self.size, 3, split.rows[:1])[0]
            if isinstance(first, Tensor) and not torch.equal(first, first[:1].expand(3, -1, -1)):
                console.print(f"{split.data}: colour images are seen in grey, for the encoder takes one channel")
        return encoder

    def encoder_key(self, encoder: nn.Module) -> dict[str, Any]:
        """What a cache has to know of the encoder and of how it sees images."""
        config = self.config
        return {"weights": weights_fingerprint(encoder), "size": self.size, "mean_std": config.mean_std,
                "patch_size": config.mask.patch_size, "heads": config.encoder_shape[2], "dtype": str(self.dtype)}  # fmt: skip

    def features(
        self, which: Inputs, splits: tuple[Split, Split], layers: Layers = "last", n_views: int = 0, seed: int = 0
    ) -> tuple[Features, Features]:
        """(train, test) features of one encoder, or raw pixels; the training images also in `n_views` augmented views."""
        if which == "pixels":
            if n_views or layers != "last":
                raise ConfigError("raw pixels have neither layers nor views: leave --layers and --views out")
            return self.pixels(splits)
        encoder = self.encoder(which, splits[0])
        of_encoder, channels = self.encoder_key(encoder), self.config.data.channels

        def of(split: Split, view: int | None = None) -> Features:
            drawn = {} if view is None else {"view": view, "seed": seed}
            make = functools.partial(
                extract_features, encoder, split.source, self.size, channels, self.config.mean_std, self.device,
                rows=split.rows, dtype=self.dtype, layers=layers, augment=None if view is None else Augment(seed, view),
            )  # fmt: skip
            return cached_features(make, self.cache, of_encoder | split.key | {"layers": layers} | drawn)

        train, test = map(of, splits)
        return Features(train.x, train.y, tuple(of(splits[0], view).x for view in range(n_views))), test

    def pixels(self, splits: tuple[Split, Split]) -> tuple[Features, Features]:
        """(train, test) raw pixels, at the run's image size unless that is large."""
        size, data = self.pixel_size, self.config.data
        train, test = (raw_pixels(s.source, size, data.channels, self.config.mean_std, rows=s.rows) for s in splits)
        return train, test

    @property
    def pixel_size(self) -> tuple[int, int]:
        return self.size if max(self.size) <= LARGEST_RAW_SIDE else RAW_SIZE

    def write(self, name: str, found: dict[str, Any]) -> None:
        """Results as JSON in the run directory, where there is one."""
        if self.home is not None:
            write_atomic(self.home / name, (json.dumps(found, indent=1) + "\n").encode())

    @contextmanager
    def unfinished(self, key: dict[str, Any]) -> Iterator[Callable[[str], Path | None]]:
        """Gives name -> file in which a training that `key` describes keeps its state; all are removed at a good end."""
        if self.cache is None:
            yield lambda name: None
            return
        folder = self.cache.parent / "unfinished" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        yield lambda name: folder / f"{name}.pt"
        for file in folder.glob("*.pt"):
            file.unlink()
        if folder.is_dir():
            folder.rmdir()


def open_splits(data: str, n_train: int | None, n_test: int | None, seed: int) -> tuple[Split, Split]:
    """The training and test images of `data`; ConfigError when they have no labels or not the same classes."""
    train, test = open_source(data, "train"), open_source(data, "test")
    if len(train.classes) < 2:
        raise ConfigError(
            f"{data}: labels of {len(train.classes)} classes, and a probe needs two; put images into class folders"
        )
    if test.classes != train.classes[: len(test.classes)]:
        odd = sorted(set(test.classes) ^ set(train.classes))
        raise ConfigError(f"{data}: its train and test splits have different classes ({odd[0]!r} is in one only)")
    return (Split(str(data), "train", train, subset(n_train, len(train), seed, TRAIN_DRAW)),
            Split(str(data), "test", test, subset(n_test, len(test), seed, TEST_DRAW)))  # fmt: skip


def open_subject(path: str | Path, device: str = "auto", cache: bool = True, image_size: int | None = None) -> Subject:
    """The run or checkpoint at `path`; features are kept below the run directory, or with the data for a lone checkpoint.

    `image_size`: side of the square images in place of the run's own; positions are computed for any grid.
    """
    path = Path(path)
    config = read_config(path)
    size = config.image_size if image_size is None else (image_size, image_size)
    subject = Subject(path, config, join_world(device).device, None, size)
    folder = (subject.home or data_dir()) / "features"
    return dataclasses.replace(subject, cache=folder) if cache else subject


def provenance(subject: Subject, which: Inputs, splits: tuple[Split, Split], seed: int) -> dict[str, Any]:
    """What every row of results says of its origin; `step` is None for weights that no run of ours made."""
    try:
        found = find_checkpoint(subject.path)
        step = read_state(found)["step"]
    except CheckpointError:
        found, step = subject.path, None
    train, test = splits
    return {"checkpoint": str(found), "step": step, "encoder": which, "image_size": list(subject.size), "data": train.data,
            "split": split_name(test), "classes": len(train.source.classes), "seed": seed}  # fmt: skip


def split_name(split: Split) -> str:
    """The split's own name where it lies in a folder of that name: val may stand in for test."""
    root = Path(getattr(split.source, "root", "")).name
    return root if root in ("val", "test") else split.name
