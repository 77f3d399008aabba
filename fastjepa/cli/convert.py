"""The command `fastjepa convert`: weights and checkpoints from one format into another."""

import argparse
import sys
from pathlib import Path

from fastjepa.cli.options import add_command, patch_grid, positions_option, positive_int

CONVERT_EXAMPLES = """examples:
  fastjepa convert IN1K-vit.h.14-300e.pth.tar encoders/h14 --to fastjepa
  fastjepa convert runs/demo encoders/demo --to transformers --which context
  fastjepa convert runs/h14 encoders/h14-timm --to timm
  fastjepa convert runs/h14 h14-ep300.pth.tar --to meta
  fastjepa convert jepa-ep100.pth.tar runs/h14 --to run --config in1k_vith14_ep300.yaml --steps-per-epoch 625
  fastjepa convert runs/demo demo.onnx --to onnx --dynamic

SRC is a run or checkpoint, an official .pth.tar, a .safetensors file of weights, or a folder of timm, transformers
(IJepaModel) or --to fastjepa. From a run or an official file --to meta takes everything, the optimizer included, so
that training can go on from it; --which makes it one encoder. --to run goes the other way: an official file becomes a
run that `fastjepa train --output DST` continues."""


def register(commands) -> None:
    """Add `convert` to the list of commands."""
    sub = add_command(commands, "convert", run_convert, "weights into the formats of others, and back", CONVERT_EXAMPLES)
    sub.add_argument("source", metavar="SRC")
    sub.add_argument("destination", metavar="DST", type=Path, help="a folder, or for meta, onnx and pt2 a file; must not exist")
    formats = ("fastjepa", "meta", "timm", "transformers", "run", "onnx", "pt2")
    sub.add_argument("--to", required=True, choices=formats, help="pt2: a torch.export program")
    default = "target where SRC has both, else the one there is"
    sub.add_argument("--which", choices=("target", "context"), help=f"which encoder (default: {default})")
    sub.add_argument("--config", type=Path, help="YAML: the shape of weights that do not say theirs; to run, the training")
    sub.add_argument("--grid", type=patch_grid, metavar="ROWSxCOLUMNS", help="of patches, where SRC does not say it")
    sub.add_argument(
        "--steps-per-epoch", type=positive_int, metavar="N", help="to run; to meta from a run that does not say it"
    )
    sub.add_argument(
        "--dynamic", action="store_true", help="to onnx and pt2: images of any size in whole patches, two or more a side"
    )
    positions_option(sub, "with --dynamic: ")


def run_convert(args: argparse.Namespace) -> None:
    """Write the weights in the other format, and say which encoders they hold and what was left out."""
    from fastjepa.weights.convert import Conversion, convert_weights

    wanted = Conversion(args.to, args.which, args.config, args.steps_per_epoch, args.dynamic, args.positions, args.grid)
    encoders, notes = convert_weights(args.source, args.destination, wanted)
    print(f"{args.destination}: {args.to}, the {' and the '.join(encoders)} encoder")
    for note in notes:
        print(note, file=sys.stderr)
