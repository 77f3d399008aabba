"""Counting and depth (paper, table 4): linear probes of frozen features on CLEVR's pictures, or on the rendered scenes.

The tasks are VTAB's (Zhai et al. 2019) as VISSL poses them. Clevr/Count asks how many objects there are, 3 to 10. Clevr/Dist
asks in which of six bins the depth of the nearest object lies; a depth is the third number of its pixel_coords. Pictures
are squashed to the encoder's size, for a crop could cut objects off. The train split trains, the val split tests.
"""

import dataclasses
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
from fastjepa.data.pixels import normalise_pixels
from fastjepa.data.prepare.catalog import DATASETS, find_dataset
from fastjepa.data.prepare.scenes import FEWEST, MOST
from fastjepa.errors import UserError
from fastjepa.evals.cache import cached_features
from fastjepa.evals.features import PIXEL_BATCH, Layers
from fastjepa.evals.held_out import labels_of
from fastjepa.evals.images import EvalImages
from fastjepa.evals.inputs import Inputs, Split, Subject, Which, provenance
from fastjepa.evals.linear import PROTOCOLS, Recipe, linear_accuracy
from fastjepa.evals.published import PAPER_COLUMNS, PUBLISHED
from fastjepa.evals.request import EvalRequest
from fastjepa.evals.scoring import TEST_DRAW, TRAIN_DRAW, Features, stratified_subset, subset

ClevrTask = Literal["count", "dist"]
DEPTH_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0, 100.0)  # upper ends of the bins of depth, each within its bin
COUNT_CLASSES = {"count": tuple(map(str, range(FEWEST, MOST + 1))), "dist": tuple(f"to {edge:g}" for edge in DEPTH_EDGES)}
CLEVR_EPOCHS = {"count": 50, "dist": 100}  # of the published protocol


class ClevrImages:
    """Pictures of one split with the labels of a task: a source, as fastjepa/data/sources.py describes it.

    `root` holds images/<split>/, or <split>/ as the rendered scenes have it, and scenes/CLEVR_<split>_scenes.json.
    """

    def __init__(self, root: Path, split: str, task: ClevrTask):
        listing = root / "scenes" / f"CLEVR_{split}_scenes.json"
        self.rendered, scenes = _read_scenes(listing)
        self._folder = next((folder for folder in (root / "images" / split, root / split) if folder.is_dir()), None)
        if self._folder is None:
            raise UserError(f"{root / 'images' / split}: no such directory; unpack all of CLEVR_v1.0.zip")
        self.classes = COUNT_CLASSES[task]
        self._names = np.array([os.fsencode(name) for name, _ in scenes])
        self._labels = np.array([_scene_label(depths, task, f"{listing}: {name}") for name, depths in scenes])

    def __len__(self) -> int:
        return len(self._names)

    def name(self, i: int) -> str:
        """Return the path of picture i."""
        return str(self._folder / os.fsdecode(self._names[i]))

    def read(self, i: int) -> bytes:
        """Return the encoded bytes of picture i."""
        return Path(self.name(i)).read_bytes()

    def label(self, i: int) -> int:
        """Return the class of picture i."""
        return int(self._labels[i])


def _read_scenes(listing: Path) -> tuple[bool, list[tuple[str, list[float]]]]:
    """Return whether this project rendered the pictures, and (file name, depths of its objects) of each picture."""
    try:
        found = json.loads(listing.read_text())
        scenes = [(s["image_filename"], [float(o["pixel_coords"][2]) for o in s["objects"]]) for s in found["scenes"]]
        rendered = found["info"].get("renderer") == "fastjepa"
    except FileNotFoundError as error:
        remedy = "give the directory CLEVR_v1.0 as it was unpacked, or --data scenes after: fastjepa data get scenes"
        raise UserError(f"{listing}: no such file; {remedy}") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{listing}: not a scene file of CLEVR v1.0 ({error!r}); unpack it again") from error
    if not scenes:
        raise UserError(f"{listing}: lists no scenes; unpack it again")
    return rendered, scenes


def _scene_label(depths: list[float], task: ClevrTask, what: str) -> int:
    """Return the class of a picture by the depths of its objects, such as 8.2 and 9.0 -> bin 1 of "dist", (8.0, 8.5]."""
    if not FEWEST <= len(depths) <= MOST:
        raise UserError(f"{what} has {len(depths)} objects; Clevr/Count is of {FEWEST} to {MOST}")
    if task == "count":
        return len(depths) - FEWEST
    if not 0 < min(depths) <= DEPTH_EDGES[-1]:
        raise UserError(f"{what} has an object at depth {min(depths):g}; Clevr/Dist is of depths up to {DEPTH_EDGES[-1]:g}")
    return bisect_left(DEPTH_EDGES, min(depths))


def evaluate_lowlevel(request: EvalRequest, task: ClevrTask, protocol: str = "default") -> dict[str, Any]:
    """Count or measure with a linear layer on frozen features; return the row that `fastjepa eval lowlevel` prints.

    Both heads are trained, linear and batch norm + linear. The result is that of the head that does better on training
    images kept out; the published protocol keeps none out and trains the linear head alone.

    Args:
        request: its data is "scenes", or the directory CLEVR_v1.0.
        task: "count" (8 classes) or "dist" (6).
        protocol: "default": the grid of `eval linear`, on pictures as they are; "published": see `lowlevel_recipe`, with flips.

    Returns:
        accuracy, ci95, n_train, n_test, chosen, validation_accuracy, task, probe, layers, protocol, chance (always giving
        the test split's most frequent class), paper (its numbers on CLEVR v1.0, or None), and `provenance`.
    """
    subject, published = request.subject(), protocol == "published"
    if not subject.pixels.are_pictures:
        raise UserError(f"{request.checkpoint}: takes arrays ({subject.pixels}), and those of CLEVR and the scenes are "
                        "pictures; give a run on pictures, 1 or 3 channels of 8 bits")  # fmt: skip
    splits = open_clevr_splits(request.data, task, request.n_train, request.n_test, request.seed)
    train, test = squashed_inputs(subject, request.encoder, splits, request.layers, flips=published)
    recipe, classes, results = lowlevel_recipe(protocol, task), len(COUNT_CLASSES[task]), {}
    for head in ("linear",) if published else ("linear", "linear_bn"):
        own = dataclasses.replace(recipe, batch_norm=head == "linear_bn")
        results[head] = linear_accuracy(train, test, classes, request.seed, subject.device, own)
    head = max(results, key=lambda name: results[name].validation_accuracy or 0)
    known = PUBLISHED[f"clevr{task}"]
    paper = None if splits[1].source.rendered else {name: getattr(known, field) for name, field in PAPER_COLUMNS.items()}
    said = {"task": task, "probe": head, "layers": request.layers, "protocol": protocol, "paper": paper,
            "chance": int(test.y.bincount().max()) / len(test.y)}  # fmt: skip
    return provenance(subject, request.encoder, splits, request.seed) | said | results[head].to_dict()


def published_beside(result: dict[str, Any]) -> str:
    """Return the sentence to read a result against: chance and, for CLEVR, the paper's numbers."""
    paper = ", ".join(f"{name} {accuracy:g}" for name, accuracy in (result["paper"] or {}).items())
    chance = f"Clevr/{result['task'].title()}: always the most frequent answer: {100 * result['chance']:.1f} %"
    return f"{chance}; the paper: {paper}" if paper else chance


def lowlevel_recipe(protocol: str, task: ClevrTask) -> Recipe:
    """Return the default grid or, as published, VISSL's recipe.

    VISSL trains by SGD with Nesterov momentum, lr 0.01 for a batch of 256 and weight decay 5e-4, for 50 or 100 epochs.
    Two things differ from the published one: the cosine goes to 0, not to 1e-4, and epochs see all pictures as they are and
    all flipped in turn, where each picture was flipped by chance.
    """
    if protocol == "published":
        return Recipe((0.01,), (5e-4,), epochs=CLEVR_EPOCHS[task], published=True, nesterov=True)
    if protocol != "default":
        raise UserError(f"protocol {protocol!r} is unknown: choose default or published")
    return PROTOCOLS["default"]


def open_clevr_splits(data: str, task: ClevrTask, n_train: int | None, n_test: int | None, seed: int) -> tuple[Split, Split]:
    """Return the train and val pictures of `data` with the labels of `task`; UserError says what is missing."""
    if task not in COUNT_CLASSES:
        raise UserError(f"task {task!r} is unknown: choose {' or '.join(COUNT_CLASSES)}")
    root = find_dataset(data) if data in DATASETS else Path(data).expanduser()
    train, val = (ClevrImages(root, split, task) for split in ("train", "val"))
    return (Split(str(data), "train", train, stratified_subset(n_train, labels_of(train), seed, TRAIN_DRAW)),
            Split(str(data), "val", val, subset(n_test, len(val), seed, TEST_DRAW)))  # fmt: skip


def squashed_inputs(
    subject: Subject, which: Inputs, splits: tuple[Split, Split], layers: Layers = "last", flips: bool = False
) -> tuple[Features, Features]:
    """Return (train, test) features of one encoder, or raw pixels, of whole pictures; `flips`: training ones also mirrored.

    The cache keeps features without labels, so that both tasks share them.
    """
    if which == "pixels" and layers != "last":
        raise UserError("raw pixels have no layers: leave --layers out")
    of = _pixel_features(subject) if which == "pixels" else _encoder_features(subject, which, layers)
    train, test = (of(split, False) for split in splits)
    views = (train, of(splits[0], True)) if flips else ()
    labels = [torch.tensor([split.source.label(int(row)) for row in split.rows]) for split in splits]
    return Features(train, labels[0], views), Features(test, labels[1])


def _encoder_features(subject: Subject, which: Which, layers: Layers) -> Callable[[Split, bool], Tensor]:
    """Return the function (split, flip) -> features (n, D)."""
    encoder = subject.encoder(which)
    of_encoder = subject.encoder_key(encoder)

    def of(split: Split, flip: bool) -> Tensor:
        images = EvalImages(split.source, subject.size, subject.pixels, split.rows, Squash(flip))
        names = "\n".join(split.source.name(int(row)) for row in split.rows)
        key = {"squashed": hashlib.sha256(names.encode()).hexdigest(), "flip": flip, "layers": layers}
        return cached_features(lambda: subject.features_of(encoder, images, layers), subject.cache, of_encoder | key).x

    return of


def _pixel_features(subject: Subject) -> Callable[[Split, bool], Tensor]:
    """Return the function (split, flip) -> normalised pixels (n, C * H * W)."""
    mean_std = subject.config.mean_std

    def of(split: Split, flip: bool) -> Tensor:
        images = EvalImages(split.source, subject.pixel_size, subject.pixels, split.rows, Squash(flip))
        return torch.cat([normalise_pixels(block, mean_std).flatten(1) for block in images.batches(PIXEL_BATCH)])

    return of


@dataclass(frozen=True)
class Squash:
    """The view that brings all of a (C, h, w) uint8 picture to (C, *size): antialiased bilinear, its aspect given up."""

    flip: bool = False

    def __call__(self, image: Tensor, row: int, size: tuple[int, int]) -> Tensor:
        return crop_image(image, (0, 0, *image.shape[1:]), size, self.flip)
