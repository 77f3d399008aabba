"""`fastjepa eval`: probes of frozen features, and fine-tuning."""

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fastjepa.cli.dense import register_dense
from fastjepa.cli.options import add_command, positions_option, positive_int

EVAL_EXAMPLES = {
    "eval": """examples:
  fastjepa eval knn --checkpoint runs/demo --data fashion-mnist
  fastjepa eval linear --checkpoint runs/demo --data /data/flowers --encoder random --json
  fastjepa eval table --checkpoint runs/demo --data fashion-mnist
  fastjepa eval lowshot --help""",
    "knn": """examples:
  fastjepa eval knn --checkpoint runs/demo --data fashion-mnist
  fastjepa eval knn --checkpoint runs/cifar10 --data cifar10 --encoder pixels --k 20 --temperature 0.1""",
    "linear": """examples:
  fastjepa eval linear --checkpoint runs/demo --data fashion-mnist --layers concat4
  fastjepa eval linear_bn --checkpoint runs/h14 --data /data/imagenet --protocol imagenet --views 10
  fastjepa eval linear --checkpoint runs/cifar10 --data cifar10 --lr 0.01 0.1 --weight-decay 0 --json""",
    "attentive": """examples:
  fastjepa eval attentive --checkpoint runs/demo --data fashion-mnist --n-train 10000
  fastjepa eval attentive --checkpoint runs/h14 --data /data/imagenet --lr 1e-3 3e-4 --no-cache""",
    "lowshot": """examples:
  fastjepa eval lowshot --checkpoint runs/cifar10 --data cifar10 --fraction 0.01
  fastjepa eval lowshot --checkpoint runs/l16 --data /data/imagenet --split-file 1percent.txt
  fastjepa eval lowshot --checkpoint runs/cifar10 --data cifar10 --method finetune --epochs 20

--method finetune stopped, it continues where it was when it is run again.""",
    "finetune": """examples:
  fastjepa eval finetune --checkpoint runs/demo --data fashion-mnist --n-train 10000 --epochs 5
  fastjepa eval finetune --checkpoint runs/h14 --data /data/imagenet --batch-size 256 --lr 3e-5 1e-4

Stopped, it continues where it was when it is run again.""",
    "transfer": """examples:
  fastjepa eval transfer --checkpoint runs/h14 --data /data/cifar100 /data/places205 /data/inat18
  fastjepa eval transfer --checkpoint runs/cifar10 --data fashion-mnist cifar10 --layers concat4 --json""",
    "lowlevel": """examples:
  fastjepa data get scenes && fastjepa eval lowlevel --checkpoint runs/small --data scenes --task count
  fastjepa eval lowlevel --checkpoint runs/h14 --data /data/CLEVR_v1.0 --task dist --layers concat4 --protocol published""",
    "table": """examples:
  fastjepa eval table --checkpoint runs/demo --data fashion-mnist
  fastjepa eval table --checkpoint runs/cifar10 --data cifar10 --n-train 20000 --json""",
}
EVAL_KINDS = {
    "knn": "weighted k-nearest neighbours of frozen features",
    "linear": "a linear layer on frozen features",
    "linear_bn": "batch norm and a linear layer on frozen features",
    "attentive": "one cross-attention block and a linear layer on frozen patch features",
    "lowshot": "few labels: logistic regression on frozen features, or fine-tuning",
    "finetune": "fine-tune the whole encoder on all labels",
    "transfer": "k-NN and linear probes on several data sets, the paper's numbers beside",
    "lowlevel": "count objects, or bin the depth of the nearest one, with a linear layer on frozen features",
    "table": "raw pixels, random, context and target encoder under the same probes",
}
TABLE_LIMITS = {"n_train": 20000, "n_test": 10000}  # of `eval table`, where neither is given


def register(commands) -> None:
    """Add the subcommand and its kinds."""
    about = "probe frozen features, or fine-tune: knn, linear, attentive, lowshot, finetune, transfer, lowlevel, dense, table"
    kinds = add_command(commands, "eval", None, about, EVAL_EXAMPLES["eval"]).add_subparsers(
        dest="kind", required=True, metavar="KIND"
    )
    for kind, words in EVAL_KINDS.items():
        sub = add_command(kinds, kind, run_eval, words, EVAL_EXAMPLES["linear" if kind == "linear_bn" else kind])
        several = {"nargs": "+"} if kind == "transfer" else {}
        shared_options(sub, several, pixels=kind in ("knn", "linear", "linear_bn", "transfer", "lowlevel"), kind=kind)
        KIND_OPTIONS[kind](sub)
    register_dense(kinds)


def shared_options(sub: argparse.ArgumentParser, several: dict, pixels: bool, kind: str) -> None:
    """Add the options that become an EvalRequest: `several` is for --data, `pixels` allows --encoder pixels."""
    weights = "run directory (its latest checkpoint), a checkpoint, or weights of the official code, timm or transformers"
    sub.add_argument("--checkpoint", required=True, type=Path, help=weights)
    data = "data set's name, or a directory with train/ and test/ or val/"
    data = "scenes, scenes-128, or the directory CLEVR_v1.0" if kind == "lowlevel" else data
    sub.add_argument("--data", required=True, help=data, **several)
    if kind != "table":
        encoders = ("target", "context", "random", *(("pixels",) if pixels else ()))
        none = "; pixels: none at all" if pixels else ""
        sub.add_argument("--encoder", choices=encoders, default="target", help=f"random: untrained{none} (default target)")
        sub.add_argument("--image-size", type=positive_int, metavar="SIDE", help="of the square images (default: the run's)")
        positions_option(sub, "with --image-size: ")
    if kind != "lowlevel":
        split = "to test on (default: test where its images have labels of training classes, else val)"
        sub.add_argument("--split", choices=("test", "val"), help=split)
    if kind != "lowshot":
        drawn = "drawn by --seed: each class gets its share as far as 6 images, and at least 1; beyond that chance decides"
        sub.add_argument("--n-train", type=positive_int, help=f"use at most this many training images, {drawn}")
    sub.add_argument("--n-test", type=positive_int, help="use at most this many test images, drawn at random")
    sub.add_argument("--seed", type=int, default=0, help="of every draw (default 0)")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    sub.add_argument("--no-cache", action="store_true", help="keep no features and no state on the disk, and use none")
    sub.add_argument("--json", action="store_true")


def layer_options(sub: argparse.ArgumentParser) -> None:
    """Add --layers, which probes of pooled features share."""
    concat4 = "concat4: the last four blocks side by side, the final norm on each (default last)"
    sub.add_argument("--layers", choices=("last", "concat4"), default="last", help=concat4)


def knn_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of k-NN: fields of ProbeOptions."""
    layer_options(sub)
    sub.add_argument(
        "--k", type=positive_int, help="neighbours (default: the best of 10 to 200 on a fifth of the training images)"
    )
    sub.add_argument("--temperature", type=float, default=0.1, help="a vote weighs exp(cosine / temperature) (default 0.1)")


def linear_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of the linear probes: fields of ProbeOptions."""
    layer_options(sub)
    protocol_option(sub, "default")
    grid = "in place of the protocol's; the best on a sixth of the training images is taken"
    sub.add_argument("--lr", type=float, nargs="+", dest="lrs", metavar="LR", help=f"learning rates {grid}")
    sub.add_argument("--weight-decay", type=float, nargs="+", dest="weight_decays", metavar="WD", help=f"decays {grid}")
    views = "random resized crops with flips, one view of each image an epoch in turn (default: the plain view)"
    sub.add_argument("--views", type=positive_int, dest="n_views", default=0, metavar="N", help=f"train on N {views}")


def protocol_option(sub: argparse.ArgumentParser, default: str | None) -> None:
    """Add --protocol; without a default the data set's name chooses."""
    published = "imagenet: LARS; cifar100, places205, inat18: SGD with Nesterov momentum; as published, but for what the "
    named = "default" if default else "by the data set's name"
    sub.add_argument("--protocol", choices=("default", "imagenet", "cifar100", "places205", "inat18"), default=default,
                     help=f"{published}head of fastjepa/evals/linear.py names (default: {named})")  # fmt: skip


def attentive_options(sub: argparse.ArgumentParser) -> None:
    """Add the fields of AttentiveOptions."""
    rates = "of several, the best on a sixth of the training images is taken (default 1e-3)"
    sub.add_argument("--lr", type=float, nargs="+", dest="lrs", default=[1e-3], metavar="LR", help=rates)
    sub.add_argument("--weight-decay", type=float, default=1e-3, metavar="WD", help="default 1e-3")
    sub.add_argument("--epochs", type=positive_int, default=20, help="default 20")
    sub.add_argument("--batch-size", type=positive_int, dest="batch", default=256, help="default 256")


def finetune_options(sub: argparse.ArgumentParser) -> None:
    """Add the fields of FinetuneOptions."""
    rates = "of several, the best on a sixth of the training images is taken (default 3e-5, or 1e-3 below width 768)"
    sub.add_argument("--lr", type=float, nargs="+", dest="lrs", metavar="LR", help=rates)
    sub.add_argument("--weight-decay", type=float, metavar="WD", help="default 0.05, or 0.4 from width 1280")
    sub.add_argument("--layer-decay", type=float, help="of the learning rate, from layer to layer (default 0.75)")
    sub.add_argument("--epochs", type=positive_int, help="default 50; on a CPU, what sees at most 250,000 images")
    sub.add_argument("--batch-size", type=positive_int, dest="batch", help="default 512, or a 25th of fewer than 12,800 images")


def lowshot_options(sub: argparse.ArgumentParser) -> None:
    """Add the fields of LowshotOptions."""
    layer_options(sub)
    sub.add_argument("--method", choices=("logistic", "finetune"), default="logistic", help="default logistic")
    images = sub.add_mutually_exclusive_group()
    images.add_argument("--fraction", type=float, default=0.01, help="share of each class, drawn by --seed (default 0.01)")
    images.add_argument("--split-file", type=Path, help="the images' names, one a line, such as SimCLR's 1percent.txt")
    sub.add_argument("--c", type=float, help="logistic: inverse regularisation (default: chosen on training images)")
    finetune_options(sub.add_argument_group("with --method finetune"))


def transfer_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of `eval transfer`."""
    layer_options(sub)
    protocol_option(sub, None)


def lowlevel_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of `eval lowlevel`."""
    layer_options(sub)
    tasks = "count: how many objects, 3 to 10; dist: in which of six bins the nearest one's depth lies"
    sub.add_argument("--task", choices=("count", "dist"), required=True, help=tasks)
    published = "published: VISSL's SGD for 50 or 100 epochs, training pictures also flipped"
    sub.add_argument("--protocol", choices=("default", "published"), default="default", help=published)


KIND_OPTIONS = {"knn": knn_options, "linear": linear_options, "linear_bn": linear_options, "attentive": attentive_options,
           "lowshot": lowshot_options, "finetune": finetune_options, "transfer": transfer_options, "lowlevel": lowlevel_options,
           "table": lambda sub: None}  # fmt: skip


def run_eval(args: argparse.Namespace) -> None:
    """Run the evaluation that was asked for, and print its result."""
    from rich.console import Console

    from fastjepa.evals.lowlevel import published_beside

    result = evaluate(args, Console(stderr=args.json))
    if args.json:
        print(json.dumps(result))
    elif "accuracy" in result:
        low, high = (100 * share for share in result["ci95"])
        accuracy = f"{100 * result['accuracy']:.1f} % (95 % interval {low:.1f} to {high:.1f})"
        print(f"{args.encoder} encoder, {args.kind}: {accuracy}")
        if args.kind == "lowlevel":
            print(published_beside(result))


def evaluate(args: argparse.Namespace, out) -> dict[str, Any]:
    """Return the result of the evaluation `args.kind`; tables are also printed on `out`."""
    from fastjepa.evals.attentive import AttentiveOptions, evaluate_attentive
    from fastjepa.evals.finetune import FinetuneOptions, evaluate_finetune
    from fastjepa.evals.lowlevel import evaluate_lowlevel
    from fastjepa.evals.lowshot import LowshotOptions, evaluate_lowshot
    from fastjepa.evals.request import EvalRequest
    from fastjepa.evals.table import ProbeOptions, evaluate_probe, evaluate_table
    from fastjepa.evals.transfer import evaluate_transfer

    request = EvalRequest(**given_fields(EvalRequest, args), cache=not args.no_cache)
    match args.kind:
        case "table":
            limits = {} if args.n_train or args.n_test else TABLE_LIMITS
            return evaluate_table(replace(request, **limits), out)
        case "transfer":
            return evaluate_transfer([replace(request, data=name) for name in args.data], args.protocol, out)
        case "attentive":
            return evaluate_attentive(request, AttentiveOptions(**given_fields(AttentiveOptions, args)))
        case "finetune":
            return evaluate_finetune(request, FinetuneOptions(**given_fields(FinetuneOptions, args)))
        case "lowshot":
            finetune = FinetuneOptions(**given_fields(FinetuneOptions, args))
            return evaluate_lowshot(request, LowshotOptions(**given_fields(LowshotOptions, args), finetune=finetune))
        case "lowlevel":
            return evaluate_lowlevel(request, args.task, args.protocol)
    return evaluate_probe(args.kind, request, ProbeOptions(**given_fields(ProbeOptions, args)))


def given_fields(of: type, args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `args` that are fields of a dataclass, by name."""
    return {field.name: getattr(args, field.name) for field in fields(of) if hasattr(args, field.name)}
