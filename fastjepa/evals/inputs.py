"""Inputs of an evaluation: the encoders of one checkpoint, and the training and test images of one data set."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fastjepa.checkpoint.directory import complete_checkpoints, find_checkpoint
from fastjepa.checkpoint.state import read_state
from fastjepa.config.load import load_config
from fastjepa.config.schema import Config
from fastjepa.data.pixels import Pixels
from fastjepa.data.prepare.catalog import data_dir
from fastjepa.data.prepare.processes import console
from fastjepa.data.sources import Source, open_source
from fastjepa.errors import CheckpointError, UserError
from fastjepa.evals.augment import Augment
from fastjepa.evals.cache import cached_features, images_fingerprint, weights_fingerprint
from fastjepa.evals.features import Layers, check_encoder_input, extract_features, raw_pixels
from fastjepa.evals.held_out import HeldOutName, labels_of, open_held_out
from fastjepa.evals.images import EvalImages
from fastjepa.evals.kmeans import kmeans_features
from fastjepa.evals.scoring import TEST_DRAW, TRAIN_DRAW, Features, stratified_subset, subset
from fastjepa.files import write_atomic
from fastjepa.loader.loader import pixels_of
from fastjepa.model.jepa import build_pair
from fastjepa.model.positions import DEFAULT_POSITIONS, Positions
from fastjepa.ranks.world import join_world
from fastjepa.run.directory import run_directory
from fastjepa.weights.official import recorded_config
from fastjepa.weights.read import is_foreign_weights, load_encoder, read_weights

Which = Literal["target", "context", "random"]  # random: untrained, of the run's seed
Inputs = Which | Literal["pixels", "kmeans", "kmeans_quadrants"]  # the last three: without a network
# Raw pixels of images above this side, or of more values, are taken at RAW_SIDE: a probe cannot hold the 150,000 values of a
# large image. Of so many channels that these are more values too, smaller ones are taken.
LARGEST_RAW_SIDE, LARGEST_RAW_VALUES, RAW_SIDE = 64, 3 * 64 * 64, 32


@dataclass(frozen=True)
class Split:
    """The images of one split that an evaluation uses."""

    data: str
    name: str
    source: Source
    rows: np.ndarray  # rising indices into source

    @property
    def key(self) -> dict[str, Any]:
        """Return the entries of a cache's key that name the images."""
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
    positions: Positions | None = DEFAULT_POSITIONS  # of patches in another size than the run's own; None: they are rotary

    @property
    def home(self) -> Path | None:
        """Return the run directory; None for weights that lie in none."""
        home = run_directory(self.path)
        return home if (home / "config.yaml").is_file() else None

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of computation: on a GPU the run's, bf16 where it names none; fp32 on a CPU."""
        low = self.device.type == "cuda" and self.config.runtime.dtype != "fp32"
        return torch.bfloat16 if low else torch.float32

    @property
    def pixels(self) -> Pixels:
        """Return what becomes of the bytes of a file, as in the run."""
        return pixels_of(self.config)

    @property
    def resized(self) -> bool:
        """Tell whether images are of another size than the run's own."""
        return self.size != self.config.image_size

    def encoder(self, which: Which, split: Split | None = None) -> nn.Module:
        """Return one of the run's encoders, frozen, on the CPU; UserError when it cannot take images of this size.

        Grey images are repeated for an encoder of three channels; where images of `split` lose their colours, it is said.
        """
        if which == "random":
            encoder = build_pair(self.config)[1].eval().requires_grad_(False)
        else:
            encoder = load_encoder(self.path, which, self.positions)
        encoder.other_positions = self.positions or encoder.other_positions
        encoder.checkpointed = self.config.runtime.checkpoint_activations  # of use to fine-tuning alone
        check_encoder_input(encoder, self.size, self.config.data.channels)
        if split is not None and self.pixels.are_pictures and self.pixels.channels == 1:
            first = EvalImages(split.source, self.size, Pixels(3), split.rows[:1])[0]
            if isinstance(first, Tensor) and not torch.equal(first, first[:1].expand(3, -1, -1)):
                console.print(f"{split.data}: colour images are seen in grey, for the encoder takes one channel")
        return encoder

    def encoder_key(self, encoder: nn.Module) -> dict[str, Any]:
        """Return the entries of a cache's key that name the encoder and how it sees images."""
        config = self.config
        key = {"weights": weights_fingerprint(encoder), "size": self.size, "mean_std": config.mean_std,
               "patch_size": config.mask.patch_size, "heads": config.encoder_shape[2], "dtype": str(self.dtype)}  # fmt: skip
        return key | self.pixels_key | ({"positions": self.positions, "antialias": encoder.antialias} if self.resized else {})

    @property
    def pixels_key(self) -> dict[str, str]:
        """Return the entries of a cache's key that name how arrays are read of their files; pictures need none."""
        return {} if self.pixels.are_pictures else {"pixels": repr(self.pixels)}

    def features(
        self, which: Inputs, splits: tuple[Split, Split], layers: Layers = "last", n_views: int = 0, seed: int = 0
    ) -> tuple[Features, Features]:
        """Return (train, test) features of one encoder, or without a network; training images also in `n_views` augmented
        views.
        """
        if which not in get_args(Which):
            if n_views or layers != "last":
                raise UserError("raw pixels have neither layers nor views: leave --layers and --views out")
            return self.of_pixels(which, splits, seed)
        encoder = self.encoder(which, splits[0])
        of_encoder = self.encoder_key(encoder)

        def of(split: Split, view: int | None = None) -> Features:
            drawn, augment = ({}, None) if view is None else ({"view": view, "seed": seed}, Augment(seed, view))
            images = EvalImages(split.source, self.size, self.pixels, split.rows, augment)
            key = of_encoder | split.key | {"layers": layers} | drawn
            return cached_features(lambda: self.features_of(encoder, images, layers), self.cache, key)

        train, test = map(of, splits)
        return Features(train.x, train.y, tuple(of(splits[0], view).x for view in range(n_views))), test

    def features_of(self, encoder: nn.Module, images: EvalImages, layers: Layers) -> Features:
        """Return features of `images`, made by one of the run's encoders on the evaluation's device."""
        return extract_features(encoder, images, self.config.mean_std, layers, self.device, self.dtype)

    def of_pixels(self, which: Inputs, splits: tuple[Split, Split], seed: int) -> tuple[Features, Features]:
        """Return (train, test) features made without a network, of images of the run's size unless that is large."""
        train, test = (EvalImages(s.source, self.pixel_size, self.pixels, s.rows) for s in splits)
        if which == "pixels":
            return raw_pixels(train, self.config.mean_std), raw_pixels(test, self.config.mean_std)
        return kmeans_features(train, test, seed, parts=2 if which == "kmeans_quadrants" else 1)

    @property
    def pixel_size(self) -> tuple[int, int]:
        """Return the (H, W) of images whose raw pixels are probed."""
        most = LARGEST_RAW_VALUES // self.pixels.channels  # pixels
        if max(self.size) <= LARGEST_RAW_SIDE and math.prod(self.size) <= most:
            return self.size
        side = max(1, min(RAW_SIDE, math.isqrt(most)))
        return side, side

    def write(self, name: str, found: dict[str, Any]) -> None:
        """Write results as JSON into the run directory, where there is one."""
        if self.home is not None:
            write_atomic(self.home / name, (json.dumps(found, indent=1) + "\n").encode())

    @contextmanager
    def unfinished(self, key: dict[str, Any]) -> Iterator[Callable[[str], Path | None]]:
        """Yield name -> file in which a training that `key` describes keeps its state; all are removed at a good end."""
        if self.cache is None:
            yield lambda name: None
            return
        folder = self.cache.parent / "unfinished" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        yield lambda name: folder / f"{name}.pt"
        for file in folder.glob("*.pt"):
            file.unlink()
        if folder.is_dir():
            folder.rmdir()


def open_splits(
    data: str, n_train: int | None, n_test: int | None, seed: int, split: HeldOutName | None = None
) -> tuple[Split, Split]:
    """Return the training and test images of `data` that have labels; UserError when they cannot be compared.

    What `open_held_out` says of them is printed, and how many training images have no label.
    """
    train = open_source(data, "train")
    held, labels = open_held_out(data, train, split), labels_of(train)
    for note in held.notes:
        console.print(note, markup=False, highlight=False)
    labelled = np.flatnonzero(labels >= 0)
    if unlabelled := len(labels) - len(labelled):
        said = f"{data}: {unlabelled} of the {len(labels)} training images have no label and are left out"
        console.print(said, markup=False, highlight=False)
    return (Split(str(data), "train", train, labelled[stratified_subset(n_train, labels[labelled], seed, TRAIN_DRAW)]),
            Split(str(data), held.name, held.source, held.rows[subset(n_test, len(held.rows), seed, TEST_DRAW)]))  # fmt: skip


def open_subject(
    path: str | Path,
    device: str = "auto",
    cache: bool = True,
    image_size: int | None = None,
    positions: Positions | None = None,
) -> Subject:
    """Open the run or checkpoint at `path`; features are kept below the run directory, or with the data for a lone checkpoint.

    Args:
        image_size: side of the square images in place of the run's own.
        positions: those of patches of that other size; UserError where there is none.
    """
    path = Path(path)
    config = read_config(path)
    size = config.image_size if image_size is None else (image_size, image_size)
    rotary = config.meta.positions == "rope"
    if positions and rotary:
        raise UserError(f"{path}: rotary positions follow any size by themselves; leave --positions out")
    subject = Subject(path, config, join_world(device).device, None, size, None if rotary else positions or DEFAULT_POSITIONS)
    if positions and not subject.resized:
        own = "{}x{}".format(*config.image_size)
        raise UserError(f"--positions is for another size than the run's own {own}: give --image-size, or leave it out")
    if subject.resized and image_size % config.mask.patch_size == 0:
        trained, patches = config.grid, image_size // config.mask.patch_size
        how = "rotary" if rotary else f"{subject.positions}; --positions chooses"
        console.print(f"{patches}x{patches} patches, trained on {trained[0]}x{trained[1]}: their positions are {how}")
    folder = (subject.home or data_dir()) / "features"
    return dataclasses.replace(subject, cache=folder) if cache else subject


def read_config(path: Path) -> Config:
    """Return the config of a checkpoint, of a run directory that has none yet, or the one that others' weights imply."""
    if is_foreign_weights(path):
        return read_weights(path).form.config()
    written = path / "config.yaml"
    if written.is_file() and not complete_checkpoints(path / "checkpoints", tag=None):
        return load_config(written)
    return recorded_config(find_checkpoint(path))


def provenance(subject: Subject, which: Inputs, splits: tuple[Split, Split], seed: int) -> dict[str, Any]:
    """Return what every row of results says of its origin; `step` is None for weights that no run of ours made."""
    try:
        found = find_checkpoint(subject.path)
        step = read_state(found)["step"]
    except CheckpointError:
        found, step = subject.path, None
    train, test = splits
    return {"checkpoint": str(found), "step": step, "encoder": which, "image_size": list(subject.size), "data": train.data,
            "positions": (subject.positions or "rotary") if subject.resized else "trained",
            "split": test.name, "classes": len(train.source.classes), "seed": seed}  # fmt: skip
