"""`fastjepa eval`: probes of frozen features."""

import argparse
import json
from pathlib import Path

from fastjepa.arguments import add, positive

EXAMPLES = """examples:
  fastjepa eval knn --checkpoint runs/demo --data fashion-mnist
  fastjepa eval linear --checkpoint runs/demo --data /data/flowers --encoder random --json
  fastjepa eval table --checkpoint runs/demo --data fashion-mnist"""


def register(commands) -> None:
    options(add(commands, "eval", evaluate, "probe frozen features: knn, linear, or a table of both", EXAMPLES))


def options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "kind", choices=("knn", "linear", "linear_bn", "table"), help="linear_bn: batch norm before the linear layer"
    )
    sub.add_argument("--checkpoint", required=True, type=Path, help="run directory or checkpoint")
    sub.add_argument("--data", required=True, help="data set's name, or a directory with train/ and test/ or val/")
    sub.add_argument("--encoder", choices=("target", "context", "random"), default="target")
    sub.add_argument("--n-train", type=positive, help="use at most this many training images")
    sub.add_argument("--n-test", type=positive, help="use at most this many test images")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    sub.add_argument("--no-cache", action="store_true", help="extract the features anew")
    sub.add_argument("--json", action="store_true")


def evaluate(args: argparse.Namespace) -> None:
    from rich.console import Console

    from fastjepa.evals import table

    limits = {"n_train": args.n_train, "n_test": args.n_test} if args.n_train or args.n_test or args.kind != "table" else {}
    common = limits | {"device": args.device, "cache": not args.no_cache}
    if args.kind == "table":
        result = table.demo_table(args.checkpoint, args.data, **common, out=Console(stderr=args.json))
    else:
        result = table.run(args.kind, args.checkpoint, args.data, args.encoder, **common)
    if args.json:
        print(json.dumps(result))
    elif args.kind != "table":
        low, high = (100 * share for share in result["ci95"])
        print(f"{args.encoder} encoder, {args.kind}: {100 * result['accuracy']:.1f} % (95 % interval {low:.1f} to {high:.1f})")
