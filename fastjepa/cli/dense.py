"""`fastjepa eval dense`: segmentation, depth and normals from frozen patch features, and pictures of what is predicted."""

import argparse
import json
from pathlib import Path
from typing import Any

from fastjepa.cli.options import add_command, positions_option, positive_float, positive_int

DENSE_TASKS = ("segmentation", "depth", "normals")
DENSE_EXAMPLES = """examples:
  fastjepa eval dense --checkpoint runs/small --data scenes --task segmentation
  fastjepa eval dense --checkpoint runs/small --data scenes --task depth --layers 2,4 --pictures
  fastjepa eval dense --checkpoint runs/h14 --task segmentation --protocol ade20k --images I/train I/val --labels L/train L/val

knn: each patch gets the mean of its nearest patches in a bank, no training. linear: softmax regression of pixels
(segmentation), ridge regression (depth, normals). Both are enlarged bilinearly to the label image's pixels."""


def register_dense(kinds) -> None:
    """Add `dense` to the kinds of `fastjepa eval`."""
    about = "segmentation, depth and normals of pixels: k-NN and a linear layer on frozen patch features"
    sub = add_command(kinds, "dense", run_dense, about, DENSE_EXAMPLES)
    weights = "run directory (its latest checkpoint), a checkpoint, or weights of the official code, timm or transformers"
    sub.add_argument("--checkpoint", required=True, type=Path, help=weights)
    sub.add_argument("--task", choices=DENSE_TASKS, required=True)
    picture_options(sub.add_argument_group("pictures and label images"))
    head_options(sub.add_argument_group("features and heads"))
    sub.add_argument("--n-train", type=positive_int, help="use at most this many training pictures, drawn at random")
    sub.add_argument("--n-test", type=positive_int, help="use at most this many test pictures, drawn at random")
    sub.add_argument("--seed", type=int, default=0, help="of every draw (default 0)")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    sub.add_argument("--no-cache", action="store_true", help="keep no features on the disk, and use none")
    sub.add_argument("--json", action="store_true")
    where = "draw test pictures, truth and predictions: dense-TASK.png in DIR (default: pictures/ in the run, or here)"
    sub.add_argument("--pictures", nargs="?", type=Path, const=Path(), metavar="DIR", help=where)
    sub.add_argument("--shown", type=positive_int, default=6, metavar="N", help="test pictures to draw (default 6)")


def picture_options(group) -> None:
    """Add the options that say where pictures and label images are, and what the label images hold."""
    group.add_argument("--data", help="scenes, scenes-128, or a directory laid out like them")
    pair = {"nargs": 2, "type": Path, "metavar": ("TRAIN", "TEST")}
    group.add_argument("--images", **pair, help="folders of pictures, in place of --data")
    group.add_argument("--labels", **pair, help="folders of label images (PNG) of the same names and sizes")
    group.add_argument("--lists", **pair, help="files that name the pictures to take, one a line (default: all)")
    kinds = "of scenes, for segmentation (default shape)"
    group.add_argument("--label-kind", choices=("shape", "material", "object"), help=kinds)
    protocol = "published segmentation by DINOv2's linear head: voc: 21 classes, 255 ignored; ade20k: 150 from 1 on, 0 ignored"
    group.add_argument("--protocol", choices=("default", "voc", "ade20k"), default="default", help=protocol)
    classes = "of segmentation (default: those in the training label images)"
    group.add_argument("--classes", type=positive_int, help=classes)
    group.add_argument("--ignore-index", type=int, help="label of pixels that do not count; 0: classes are numbered from 1")
    scale = "a depth image holds SCALE times the distance, and 0 where there is none (default 1000: millimetres)"
    group.add_argument("--depth-scale", type=positive_float, metavar="SCALE", help=scale)


def head_options(group) -> None:
    """Add the options of features, neighbours and the linear layer."""
    encoders = "rows of the table; random: untrained, pixels: of the patches themselves (default: all that there are)"
    choices = ("target", "context", "random", "pixels")
    group.add_argument("--encoder", nargs="+", choices=choices, dest="encoders", metavar="NAME", help=encoders)
    layers = "numbers of blocks from 1, by commas: side by side, the final norm on each (default: the last)"
    group.add_argument("--layers", type=layer_numbers, metavar="LIST", help=layers)
    group.add_argument("--image-size", type=positive_int, metavar="SIDE", help="of the square images (default: the run's)")
    positions_option(group, "with --image-size: ")
    group.add_argument("--bank", type=positive_int, default=20_000, help="knn: patches of the bank (default 20000)")
    group.add_argument("--k", type=positive_int, default=30, help="knn: neighbours (default 30)")
    softmax = "knn: neighbours weigh softmax(cosine / temperature) (default 0.02)"
    group.add_argument("--temperature", type=float, default=0.02, help=softmax)
    grid = "linear, segmentation: in place of the protocol's; of several, the best on a sixth of the training pictures is taken"
    group.add_argument("--lr", type=positive_float, nargs="+", dest="lrs", metavar="LR", help=grid)
    group.add_argument("--weight-decay", type=float, metavar="WD", help="linear, segmentation (default 1e-4)")
    group.add_argument("--steps", type=positive_int, help="linear, segmentation (default 2000; published 40000)")
    group.add_argument("--batch-size", type=positive_int, dest="batch", help="linear, segmentation (default 32; published 16)")


def layer_numbers(text: str) -> tuple[int, ...]:
    """Read numbers of blocks such as 2,4."""
    return tuple(positive_int(part) for part in text.split(","))


def run_dense(args: argparse.Namespace) -> None:
    """Measure, print the table or its JSON, and draw the pictures that were asked for."""
    from rich.console import Console

    from fastjepa.evals.dense.table import evaluate_dense
    from fastjepa.evals.request import EvalRequest
    from fastjepa.files import require_writable
    from fastjepa.run.directory import run_directory

    folder = None
    if args.pictures is not None:
        home = run_directory(args.checkpoint)
        inside = home if (home / "config.yaml").is_file() else Path()
        folder = inside / "pictures" if args.pictures == Path() else args.pictures
        require_writable(folder, folder=True)
    names = ("checkpoint", "data", "image_size", "positions", "n_train", "n_test", "seed", "device")
    request = EvalRequest(**{name: getattr(args, name) for name in names}, cache=not args.no_cache)
    table, sample = evaluate_dense(request, dense_options(args), Console(stderr=args.json))
    if folder is not None:
        table["pictures"] = str(draw_predictions(table, sample, folder))
    if args.json:
        print(json.dumps(table))
    elif folder is not None:
        print(table["pictures"])


def dense_options(args: argparse.Namespace) -> Any:
    """Return the options as the evaluation takes them."""
    from dataclasses import replace

    from fastjepa.evals.dense.heads import DenseRecipe, PatchNeighbours
    from fastjepa.evals.dense.table import DENSE_PROTOCOLS, DenseOptions

    published = DENSE_PROTOCOLS.get(args.protocol)
    given = {name: value for name in ("lrs", "weight_decay", "steps", "batch") if (value := getattr(args, name)) is not None}
    recipe = replace(published.recipe if published else DenseRecipe(), **given)
    names = ("task", "label_kind", "protocol", "classes", "ignore_index", "depth_scale", "layers", "encoders")
    pairs = {name: value and tuple(value) for name in ("images", "labels", "lists") for value in [getattr(args, name)]}
    asked = {name: getattr(args, name) for name in names} | pairs
    neighbours = PatchNeighbours(args.bank, args.k, args.temperature)
    return DenseOptions(**asked, neighbours=neighbours, recipe=recipe, shown=args.shown if args.pictures is not None else 0)


def draw_predictions(table: dict[str, Any], sample, folder: Path) -> Path:
    """Write the picture of predictions beside the truth, and return its file."""
    from fastjepa.visualize.dense import predictions_sheet
    from fastjepa.visualize.images import save_picture

    file = folder / f"dense-{table['task']}.png"
    save_picture(predictions_sheet(table["task"], sample), file)
    return file
