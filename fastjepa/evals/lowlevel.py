"""Counting and depth (paper, table 4): linear probes of frozen features on CLEVR's pictures, or on the rendered scenes.

The tasks are VTAB's (Zhai et al. 2019) as VISSL poses them. Clevr/Count: how many objects, 3 to 10. Clevr/Dist: in which of
six bins the depth of the nearest one lies, the least third of CLEVR's pixel_coords. Pictures are squashed to the encoder's
size: a crop could cut objects off. The train split trains, the val split tests.
"""

import functools
import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastjepa.data.crops import crop_image
from fastjepa.data.prepare.catalog import DATASETS, find_dataset
from fastjepa.data.prepare.scenes import FEWEST, MOST
from fastjepa.errors import ConfigError
from fastjepa.evals.cache import cached_features
from fastjepa.evals.features import Layers, extract_features
from fastjepa.evals.images import EvalImages, normalise_pixels
from fastjepa.evals.inputs import Inputs, Split, Subject, open_subject, provenance
from fastjepa.evals.linear import PROTOCOLS, Recipe
from fastjepa.evals.published import PAPER_COLUMNS, PUBLISHED
from fastjepa.evals.scoring import TEST_DRAW, TRAIN_DRAW, Features, subset
from fastjepa.evals.table import PROBES
from fastjepa.weights.encoders import Which

ClevrTask = Literal["count", "dist"]
DEPTH_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0, 100.0)  # upper ends of the bins of depth, each within its bin
COUNT_CLASSES = {"count": tuple(map(str, range(FEWEST, MOST + 1))), "dist": tuple(f"to {edge:g}" for edge in DEPTH_EDGES)}
CLEVR_EPOCHS = {"count": 50, "dist": 100}  # published


class ClevrImages:
    """The pictures of one split with the labels of a task; a source, as fastjepa/data/sources.py has them.

    `root` holds images/<split>/, or <split>/ as the rendered scenes have it, and scenes/CLEVR_<split>_scenes.json.
    """

    def __init__(self, root: Path, split: str, task: ClevrTask):
        listing = root / "scenes" / f"CLEVR_{split}_scenes.json"
        self.rendered, scenes = _read_scenes(listing)
        self._folder = next((folder for folder in (root / "images" / split, root / split) if folder.is_dir()), None)
        if self._folder is None:
            raise ConfigError(f"{root / 'images' / split}: no such directory; unpack all of CLEVR_v1.0.zip")
        self.classes = COUNT_CLASSES[task]
        self._names = np.array([os.fsencode(name) for name, _ in scenes])
        self._labels = np.array([_scene_label(depths, task, f"{listing}: {name}") for name, depths in scenes])

    def __len__(self) -> int:
        return len(self._names)

    def name(self, i: int) -> str:
        return str(self._folder / os.fsdecode(self._names[i]))

    def read(self, i: int) -> bytes:
        return Path(self.name(i)).read_bytes()

    def label(self, i: int) -> int:
        return int(self._labels[i])


def _read_scenes(listing: Path) -> tuple[bool, list[tuple[str, list[float]]]]:
    """Whether this project rendered the pictures, and of each its file name and the depths of its objects."""
    try:
        found = json.loads(listing.read_text())
        scenes = [(s["image_filename"], [float(o["pixel_coords"][2]) for o in s["objects"]]) for s in found["scenes"]]
        rendered = found["info"].get("renderer") == "fastjepa"
    except FileNotFoundError as error:
        remedy = "give the directory CLEVR_v1.0 as it was unpacked, or --data scenes after: fastjepa data get scenes"
        raise ConfigError(f"{listing}: no such file; {remedy}") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{listing}: not a scene file of CLEVR v1.0 ({error!r}); unpack it again") from error
    if not scenes:
        raise ConfigError(f"{listing}: lists no scenes; unpack it again")
    return rendered, scenes


def _scene_label(depths: list[float], task: ClevrTask, what: str) -> int:
    if not FEWEST <= len(depths) <= MOST:
        raise ConfigError(f"{what} has {len(depths)} objects; Clevr/Count is of {FEWEST} to {MOST}")
    if task == "count":
        return len(depths) - FEWEST
    if not 0 < min(depths) <= DEPTH_EDGES[-1]:
        raise ConfigError(f"{what} has an object at depth {min(depths):g}; Clevr/Dist is of depths up to {DEPTH_EDGES[-1]:g}")
    return bisect_left(DEPTH_EDGES, min(depths))


def evaluate_lowlevel(
    checkpoint: str | Path,
    data: str,
    task: ClevrTask,
    encoder: Inputs = "target",
    n_train: int | None = None,
    n_test: int | None = None,
    device: str = "auto",
    cache: bool = True,
    seed: int = 0,
    *,
    layers: Layers = "last",
    image_size: int | None = None,
    protocol: str = "default",
) -> dict[str, Any]:
    """Count or measure with a linear layer on frozen features: what `fastjepa eval lowlevel` prints.

    Args, beside those of `table.run`:
        data: "scenes", or the directory CLEVR_v1.0.
        task: "count" (8 classes) or "dist" (6).
        protocol: "default": the grid of `eval linear`, on pictures as they are; "published": see `recipe`, with flips.

    Both heads are trained, linear and batch norm + linear; the one that does better on training images kept out is the
    result, under the published protocol, which keeps none out, the linear one.

    Returns:
        accuracy, ci95, n_train, n_test, chosen, validation_accuracy, task, probe, layers, protocol, chance (always giving
        the test split's most frequent class), paper (its numbers on CLEVR v1.0, or None), and `provenance`.
    """
    splits = open_clevr_splits(data, task, n_train, n_test, seed)
    subject = open_subject(checkpoint, device, cache, image_size)
    train, test = squashed_inputs(subject, encoder, splits, layers, flips=protocol == "published")
    classes, settings = (
        len(COUNT_CLASSES[task]),
        {"seed": seed, "device": subject.device, "recipe": lowlevel_recipe(protocol, task)},
    )
    heads = ("linear",) if protocol == "published" else ("linear", "linear_bn")
    results = {head: PROBES[head](train, test, classes, **settings) for head in heads}
    head = max(heads, key=lambda name: results[name].validation_accuracy or 0)
    known = PUBLISHED[f"clevr{task}"]
    paper = None if splits[1].source.rendered else {name: getattr(known, field) for name, field in PAPER_COLUMNS.items()}
    said = {"task": task, "probe": head, "layers": layers, "protocol": protocol, "paper": paper,
            "chance": int(test.y.bincount().max()) / len(test.y)}  # fmt: skip
    return provenance(subject, encoder, splits, seed) | said | results[head].to_dict()


def published_beside(result: dict[str, Any]) -> str:
    """What to read a result against: chance and, for CLEVR, the paper's numbers."""
    paper = ", ".join(f"{name} {accuracy:g}" for name, accuracy in (result["paper"] or {}).items())
    chance = f"Clevr/{result['task'].title()}: always the most frequent answer: {100 * result['chance']:.1f} %"
    return f"{chance}; the paper: {paper}" if paper else chance


def lowlevel_recipe(protocol: str, task: ClevrTask) -> Recipe:
    """The default grid; or VISSL's: SGD with Nesterov momentum, lr 0.01 for a batch of 256, decay 5e-4, 50 or 100 epochs.

    Of the published one, the cosine goes to 0, not to 1e-4, and epochs see all pictures as they are and flipped in turn,
    not each picture by chance.
    """
    if protocol == "published":
        return Recipe((0.01,), (5e-4,), epochs=CLEVR_EPOCHS[task], published=True, nesterov=True)
    if protocol != "default":
        raise ConfigError(f"protocol {protocol!r} is unknown: choose default or published")
    return PROTOCOLS["default"]


def open_clevr_splits(data: str, task: ClevrTask, n_train: int | None, n_test: int | None, seed: int) -> tuple[Split, Split]:
    """The train and val pictures of `data` with the labels of `task`; ConfigError says what is missing."""
    if task not in COUNT_CLASSES:
        raise ConfigError(f"task {task!r} is unknown: choose {' or '.join(COUNT_CLASSES)}")
    root = find_dataset(data) if data in DATASETS else Path(data).expanduser()
    train, val = (ClevrImages(root, split, task) for split in ("train", "val"))
    return (Split(str(data), "train", train, subset(n_train, len(train), seed, TRAIN_DRAW)),
            Split(str(data), "val", val, subset(n_test, len(val), seed, TEST_DRAW)))  # fmt: skip


def squashed_inputs(
    subject: Subject, which: Inputs, splits: tuple[Split, Split], layers: Layers = "last", flips: bool = False
) -> tuple[Features, Features]:
    """(train, test) features of one encoder, or raw pixels, of whole pictures; `flips`: training ones also mirrored.

    The cache keeps features without labels, so that both tasks share them.
    """
    if which == "pixels" and layers != "last":
        raise ConfigError("raw pixels have no layers: leave --layers out")
    of = _pixel_features(subject) if which == "pixels" else _encoder_features(subject, which, layers)
    train, test = (of(split, False) for split in splits)
    views = (train, of(splits[0], True)) if flips else ()
    labels = [torch.tensor([split.source.label(int(row)) for row in split.rows]) for split in splits]
    return Features(train, labels[0], views), Features(test, labels[1])


def _encoder_features(subject: Subject, which: Which, layers: Layers) -> Callable[[Split, bool], Tensor]:
    """(split, flip) -> features (n, D)."""
    encoder = subject.encoder(which)
    of_encoder, channels = subject.encoder_key(encoder), subject.config.data.channels

    def of(split: Split, flip: bool) -> Tensor:
        names = "\n".join(split.source.name(int(row)) for row in split.rows)
        key = {"squashed": hashlib.sha256(names.encode()).hexdigest(), "flip": flip, "layers": layers}
        make = functools.partial(
            extract_features, encoder, split.source, subject.size, channels, subject.config.mean_std, subject.device,
            rows=split.rows, dtype=subject.dtype, layers=layers, augment=Squash(flip),
        )  # fmt: skip
        return cached_features(make, subject.cache, of_encoder | key).x

    return of


def _pixel_features(subject: Subject) -> Callable[[Split, bool], Tensor]:
    """(split, flip) -> normalised pixels (n, C * H * W)."""
    channels, mean_std = subject.config.data.channels, subject.config.mean_std

    def of(split: Split, flip: bool) -> Tensor:
        images = EvalImages(split.source, subject.pixel_size, channels, split.rows, Squash(flip))
        return torch.cat([normalise_pixels(block, mean_std).flatten(1) for block in images.batches(1024)])

    return of


@dataclass(frozen=True)
class Squash:
    """All of a (C, h, w) uint8 picture at another size, (C, *size): antialiased bilinear, its aspect given up."""

    flip: bool = False

    def __call__(self, image: Tensor, row: int, size: tuple[int, int]) -> Tensor:
        return crop_image(image, (0, 0, *image.shape[1:]), size, self.flip)
