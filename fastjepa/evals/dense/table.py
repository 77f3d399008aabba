"""Dense evaluation: raw patches and the encoders of one checkpoint, by neighbours and by a linear layer, in one table.

A picture is squashed to the encoder's size, its prediction enlarged to the size of its label image and compared there, pixel
by pixel. Intervals are bootstrapped over the test pictures.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastjepa.data.pixels import RGB_PICTURES, Pixels
from fastjepa.data.prepare.processes import console
from fastjepa.data.prepare.scenes import DEPTH_STEPS
from fastjepa.errors import UserError
from fastjepa.evals.dense.heads import (
    READ_BATCH,
    DenseRecipe,
    Examples,
    PatchNeighbours,
    Predictor,
    constant_value,
    enlarged_maps,
    linear_predictor,
    neighbour_predictor,
)
from fastjepa.evals.dense.labels import (
    SCENE_KINDS,
    LabelledPictures,
    fitted_labels,
    paired_pictures,
    read_labels,
    rendered_pictures,
)
from fastjepa.evals.dense.patches import layer_patches, raw_patches
from fastjepa.evals.dense.tasks import DenseTask, DenseTaskName, Depth, Normals, Segmentation, require_torchmetrics
from fastjepa.evals.inputs import Split, Subject, provenance
from fastjepa.evals.patch_features import PatchReader, kept_patches
from fastjepa.evals.request import EvalRequest
from fastjepa.evals.scoring import TEST_DRAW, TRAIN_DRAW, subset
from fastjepa.rng import SPLIT_STREAM, generator
from fastjepa.weights.read import NETWORK_OF, is_foreign_weights, load_encoder, starting_networks

HEAD_NAMES = {"knn": "k-NN", "linear": "linear"}
SCENE_CLASSES = {"shape": 4, "material": 3, "object": 11}
RESAMPLES, RESAMPLE_DRAW = 1000, (1 << 38) + 1  # of the test pictures; step of SPLIT_STREAM


@dataclass(frozen=True)
class DenseProtocol:
    """A published linear segmentation: its classes, the number its label images ignore, and the training of its head."""

    classes: int
    ignored: int
    recipe: DenseRecipe


# The heads are those of DINOv2 (Oquab et al. 2023, table 10 and its published configs): batch norm and a linear layer on the
# last block's patches, AdamW, 40,000 steps of 16 pictures. The classes are those of mmsegmentation, whose data sets it uses.
PUBLISHED_HEAD = DenseRecipe(lrs=(1e-3,), weight_decay=1e-4, steps=40_000, batch=16)
DENSE_PROTOCOLS = {"voc": DenseProtocol(21, 255, PUBLISHED_HEAD), "ade20k": DenseProtocol(150, 0, PUBLISHED_HEAD)}


@dataclass(frozen=True)
class DenseOptions:
    """Options of a dense evaluation; the pictures are those of the request's data, or of the folders `images`."""

    task: DenseTaskName
    label_kind: str | None = None  # of rendered scenes, one of SCENE_KINDS[task]; None: the first
    images: tuple[Path, Path] | None = None  # folders of train and test pictures
    labels: tuple[Path, Path] | None = None  # folders of their label images
    lists: tuple[Path, Path] | None = None  # files that name the pictures to take
    protocol: str = "default"  # or a name of DENSE_PROTOCOLS
    classes: int | None = None  # None: those that the training label images hold
    ignore_index: int | None = None
    depth_scale: float | None = None  # of the task depth; None: DEPTH_STEPS, as of the scenes
    layers: tuple[int, ...] | None = None  # numbers of blocks from 1; None: the last
    encoders: Sequence[str] | None = None  # of target, context, random, pixels; None: all that there are
    neighbours: PatchNeighbours = PatchNeighbours()
    recipe: DenseRecipe | None = None  # None: the protocol's
    shown: int = 0  # test pictures whose predictions are returned


@dataclass(frozen=True)
class ShownPredictions:
    """The first test pictures, what is true of their pixels, and what is predicted; arrays at the label images' sizes."""

    pictures: list[bytes]
    truth: list[np.ndarray]  # classes (H, W), depths (1, H, W) or vectors (3, H, W)
    pixels: Pixels = RGB_PICTURES  # what becomes of the pictures' bytes
    predicted: dict[str, list[np.ndarray]] = field(default_factory=dict)  # {"row, head": one a picture}


def evaluate_dense(
    request: EvalRequest, options: DenseOptions, out: Console | None = None
) -> tuple[dict[str, Any], ShownPredictions]:
    """Measure patches by a task: `encoder`, `layers` and `split` of the request play no part.

    The table is printed on `out` (default: standard output), and written to dense.json in the run directory, which holds the
    latest table of each task.

    Returns:
        ({task, data, n_train, n_test, scores, constant, rows {name: {head: {score: {value, ci95}}, chosen}} ...}, the first
        `options.shown` test pictures with predictions).
    """
    require_torchmetrics()
    splits = open_dense_splits(request, options)
    subject = request.subject()
    task, stored = labels_of_splits(splits, options, subject.pixels)
    truth = [task.truth(image[None])[0] for image in stored[1]]
    sample = ShownPredictions([splits[1].source.read(int(row)) for row in splits[1].rows[: options.shown]],
                              [image.numpy() for image in truth[: options.shown]], subject.pixels)  # fmt: skip
    fitted, rows, constant = fitted_labels(stored[0], subject.size), {}, None
    for name in dense_rows(subject, options.encoders):
        maker = raw_patches(subject) if name == "raw patches" else layer_patches(
            subject, name.split()[0], options.layers, splits[0])  # fmt: skip
        console.print(f"{name}: {maker.shape[1]} features a patch, {maker.shape[0]} patches")
        train, test = (kept_patches(subject, maker, split) for split in splits)
        examples = Examples(train, fitted, task, subject.config.mask.patch_size, subject.device)
        constant = constant or measured_constant(examples, truth, request.seed)
        heads, chosen = fit_predictors(examples, options, request.seed)
        counts = count_predictions(examples, test, truth, heads, (name, sample))
        rows[name] = {head: scores_of(task, found, request.seed) for head, found in counts.items()} | {"chosen": chosen}
    table = dense_table(request, options, subject, splits, task) | {"constant": constant, "rows": rows}
    keep_table(subject, table)
    show_dense_table(table, out or Console())
    return table, sample


def open_dense_splits(request: EvalRequest, options: DenseOptions) -> tuple[Split, Split]:
    """Return the train and test pictures; UserError says what is missing."""
    named = scene_splits(request.data, options) if request.data else folder_splits(options)
    limits = (request.n_train, TRAIN_DRAW), (request.n_test, TEST_DRAW)
    return tuple(Split(str(request.data or options.images[0]), name, source, subset(most, len(source), request.seed, draw))
                 for (name, source), (most, draw) in zip(named.items(), limits, strict=True))  # fmt: skip


def scene_splits(data: str, options: DenseOptions) -> dict[str, LabelledPictures]:
    """Return the pictures of rendered scenes with the labels of the task."""
    if options.images or options.labels or options.lists:
        raise UserError("--data says where the pictures are; leave --images, --labels and --lists out, or --data")
    kinds = SCENE_KINDS[options.task]
    kind = options.label_kind or kinds[0]
    if kind not in kinds:
        raise UserError(f"--label-kind {kind}: {options.task} of rendered scenes has {' or '.join(kinds)}; leave it out")
    return {name: rendered_pictures(data, kind, name) for name in ("train", "val")}


def folder_splits(options: DenseOptions) -> dict[str, LabelledPictures]:
    """Return the pictures of folders that have label images."""
    if not options.images or not options.labels:
        said = "say where the pictures are: --data scenes or scenes-128, or --images TRAIN TEST and --labels TRAIN TEST"
        raise UserError(said)
    if options.label_kind:
        raise UserError("--label-kind is for rendered scenes; leave it out")
    paths = zip(("train", "test"), options.images, options.labels, options.lists or (None, None), strict=True)
    return {name: paired_pictures(images, labels, listing) for name, images, labels, listing in paths}


def labels_of_splits(
    splits: tuple[Split, Split], options: DenseOptions, pixels: Pixels = RGB_PICTURES
) -> tuple[DenseTask, list[list[np.ndarray]]]:
    """Return the task and the label images of train and test, all of them checked; `pixels` are those of the pictures."""
    if options.depth_scale is not None and options.task != "depth":
        raise UserError(f"--depth-scale is for depth, not {options.task}; leave it out")
    if options.task == "segmentation":
        return segmentation_labels(splits, options, pixels)
    if options.protocol != "default" or options.classes is not None or options.ignore_index is not None:
        raise UserError(f"--protocol, --classes and --ignore-index are for segmentation, not {options.task}; leave them out")
    task = Normals() if options.task == "normals" else Depth(options.depth_scale or DEPTH_STEPS)
    return task, [read_labels(split, task, pixels) for split in splits]


def segmentation_labels(
    splits: tuple[Split, Split], options: DenseOptions, pixels: Pixels
) -> tuple[Segmentation, list[list[np.ndarray]]]:
    """Return the task, its classes those of the protocol, those asked for, or those that the training label images hold."""
    classes, ignored = options.classes, options.ignore_index
    if options.protocol != "default":
        if classes is not None or ignored is not None:
            raise UserError(
                f"--protocol {options.protocol} says classes and ignored number; leave --classes and --ignore-index out"
            )
        found = dense_protocol(options.protocol)
        classes, ignored = found.classes, found.ignored
    elif classes is None and options.images is None:
        classes = SCENE_CLASSES[options.label_kind or SCENE_KINDS["segmentation"][0]]
    train = None
    if classes is None:
        train = read_labels(splits[0], Segmentation(2**31, ignored), pixels)
        highest = max(int(number) for image in train for number in {-1, *np.unique(image).tolist()} - {ignored})
        classes = highest + 1 - int(ignored == 0)
        console.print(f"{splits[0].data}: {classes} classes in the training label images; --classes says others")
    if classes < 2:
        raise UserError(
            f"{classes} classes: segmentation needs at least two; check --classes, --ignore-index and the label images"
        )
    task = Segmentation(classes, ignored)
    return task, [train or read_labels(splits[0], task, pixels), read_labels(splits[1], task, pixels)]


def dense_protocol(name: str) -> DenseProtocol:
    """Return a published protocol by its name."""
    if name not in DENSE_PROTOCOLS:
        raise UserError(f"protocol {name!r} is unknown: choose default, {' or '.join(DENSE_PROTOCOLS)}")
    return DENSE_PROTOCOLS[name]


def dense_rows(subject: Subject, asked: Sequence[str] | None) -> list[str]:
    """Return the rows of the table: those asked for, or raw patches, a random encoder, and the encoders that there are."""
    if asked is not None:
        return ["raw patches" if which == "pixels" else f"{which} encoder" for which in dict.fromkeys(asked)]
    held = ["context", "target"]
    if is_foreign_weights(subject.path) and not all(name in starting_networks(subject.path) for name in NETWORK_OF.values()):
        held = [load_encoder(subject.path).which]
    trained = subject.home is None or any((subject.home / "checkpoints").glob("*"))
    return ["raw patches", "random encoder", *(f"{which} encoder" for which in held if trained)]


def fit_predictors(examples: Examples, options: DenseOptions, seed: int) -> tuple[dict[str, Predictor], dict[str, Any]]:
    """Return the prediction of both heads, and what was chosen for them."""
    published = options.protocol != "default"
    recipe = options.recipe or (dense_protocol(options.protocol).recipe if published else DenseRecipe())
    neighbours = neighbour_predictor(examples, options.neighbours, seed)
    linear, chosen = linear_predictor(examples, recipe, seed)
    return {"knn": neighbours, "linear": linear}, chosen


def count_predictions(
    examples: Examples,
    test: PatchReader,
    truth: list[Tensor],
    heads: dict[str, Predictor],
    shown: tuple[str, ShownPredictions],
) -> dict[str, Tensor]:
    """Return the counts (n, S) of each head's predictions; those of the first pictures are kept in `shown`."""
    row, sample = shown
    found, task, start = {head: [] for head in heads}, examples.task, 0
    for x in test(torch.arange(len(truth)), READ_BATCH, "test"):
        for head, predict in heads.items():
            values = predict(x)
            kept = sample.predicted.setdefault(f"{row}, {HEAD_NAMES[head]}", [])
            for own, true in zip(values, truth[start : start + len(x)], strict=True):
                predicted = task.predict(enlarged_maps(own[None], examples.grid, tuple(true.shape[-2:]))[0])
                found[head].append(task.counts(predicted, true.to(predicted.device)).cpu())
                if len(kept) < len(sample.truth):
                    kept.append(predicted.cpu().numpy())
        start += len(x)
    return {head: torch.stack(counts) for head, counts in found.items()}


def measured_constant(examples: Examples, truth: list[Tensor], seed: int) -> dict[str, Any]:
    """Return the scores of always the most frequent class, or the mean depth or normal, of the training pictures: chance."""
    task, value = examples.task, constant_value(examples).cpu()
    counts = []
    for true in truth:
        predicted = task.predict(value[:, None, None].expand(-1, *true.shape[-2:]))
        counts.append(task.counts(predicted, true))
    return scores_of(task, torch.stack(counts), seed)


def scores_of(task: DenseTask, counts: Tensor, seed: int) -> dict[str, Any]:
    """Return {score: {value, ci95}} of the counts (n, S) of n pictures; the interval is that of resampled pictures."""
    n, whole = len(counts), task.score(counts.sum(dim=0))
    drawn = generator(seed, SPLIT_STREAM, RESAMPLE_DRAW).multinomial(n, np.full(n, 1 / n), RESAMPLES)  # how often each picture
    several = task.score(torch.from_numpy(drawn).double() @ counts)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    found = {name: {"value": float(value), "ci95": several[name].nanquantile(ends).tolist()} for name, value in whole.items()}
    if not all(np.isfinite(one["value"]) for one in found.values()):
        raise UserError("no pixel of the test label images has a value; check --depth-scale, --ignore-index and the files")
    return found


def dense_table(
    request: EvalRequest, options: DenseOptions, subject: Subject, splits: tuple[Split, Split], task: DenseTask
) -> dict[str, Any]:
    """Return all that a table says beside its numbers."""
    origin = provenance(subject, "target", splits, request.seed)
    origin = {key: value for key, value in origin.items() if key not in ("encoder", "classes")}
    scores = {name: score._asdict() for name, score in task.scores.items()}
    said = {"task": task.name, "protocol": options.protocol, "layers": list(options.layers or []) or "last",
            "bank": options.neighbours.bank, "k": options.neighbours.k, "temperature": options.neighbours.temperature,
            "n_train": len(splits[0].rows), "n_test": len(splits[1].rows), "scores": scores}  # fmt: skip
    about = {"classes": task.channels, "ignore_index": task.ignored} if isinstance(task, Segmentation) else {}
    return origin | said | about | ({"depth_scale": task.scale} if isinstance(task, Depth) else {})


def keep_table(subject: Subject, table: dict[str, Any]) -> None:
    """Write a table into dense.json of the run directory, beside those of other tasks."""
    if subject.home is not None:
        subject.write("dense.json", kept_tables(subject.home) | {table["task"]: table})


def kept_tables(home: Path) -> dict[str, Any]:
    """Return the tables in a run's dense.json by their tasks; none where there is no such file."""
    file = home / "dense.json"
    try:
        found = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); move it away") from error
    return found if isinstance(found, dict) else {}


def show_dense_table(table: dict[str, Any], out: Console) -> None:
    """Print a table that `evaluate_dense` made."""
    layers = "last layer" if table["layers"] == "last" else f"layers {', '.join(map(str, table['layers']))}"
    title = f"{table['data']}: {table['task']}, {layers}, ± half the 95 % interval"
    counts = f"{table['n_train']} training and {table['n_test']} test pictures"
    heads = [f"{HEAD_NAMES[head]}\n{score['title']}" for head in HEAD_NAMES for score in table["scores"].values()]
    grid = Table("", *heads, title=title, caption=counts)
    constant = score_cells(table, table["constant"])
    grid.add_row("constant", *constant, *constant)
    for name, row in table["rows"].items():
        grid.add_row(name, *(cell for head in HEAD_NAMES for cell in score_cells(table, row[head])))
    out.print(grid)


def score_cells(table: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return the scores of one head in words, each with half its interval."""
    return [in_units(table["scores"][name], one) for name, one in found.items()]


def in_units(score: dict[str, Any], found: dict[str, Any]) -> str:
    """Return a score as it is shown, with half its interval."""
    low, high = found["ci95"]
    return f"{score['factor'] * found['value']:{score['form']}} ± {score['factor'] * (high - low) / 2:{score['form']}}"
