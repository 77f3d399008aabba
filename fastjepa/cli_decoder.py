"""`fastjepa decoder`: train the diffusion decoder with which `fastjepa visualize` shows what the predictor says."""

import argparse
from pathlib import Path

from fastjepa.arguments import add, not_negative, positive

EXAMPLES = """examples:
  fastjepa decoder runs/demo --data fashion-mnist
  fastjepa decoder runs/cifar10 --data cifar10 --steps 4000 --output decoders/cifar10
  fastjepa visualize runs/demo --data fashion-mnist --what samples

The checkpoint's networks stay as they are. Stopped at any moment, the same command goes on."""


def register(commands) -> None:
    sub = add(commands, "decoder", decoder, "train a diffusion decoder of what the predictor says", EXAMPLES)
    sub.add_argument(
        "checkpoint", type=Path, help="run directory (its latest checkpoint), a checkpoint, or an official .pth.tar"
    )
    sub.add_argument("--data", required=True, help="data set's name, or a directory with train/")
    sub.add_argument("--output", type=Path, metavar="DIR", help="default: decoder/ in the run directory, or here")
    sub.add_argument("--steps", type=positive, default=1500, help="optimizer steps (default 1500)")
    sub.add_argument("--batch", type=positive, default=64, help="images a step (default 64)")
    sub.add_argument("--seed", type=not_negative, default=0, help="of weights, images, masks and noise (default 0)")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def decoder(args: argparse.Namespace) -> None:
    from fastjepa import gallery
    from fastjepa.evals.subject import open_subject
    from fastjepa.studies import decoder as decoders

    subject = open_subject(args.checkpoint, args.device, cache=False)
    split = gallery.open_split(args.data, "train", None, args.seed)
    settings = decoders.Settings(args.steps, args.batch, seed=args.seed)
    print(decoders.train(subject, split, args.output or home(subject), settings))


def home(subject) -> Path:
    """Where a decoder lies unless told otherwise."""
    return (subject.home or Path()) / "decoder"
