"""The command `fastjepa decoder`: train the diffusion decoder that `fastjepa visualize` draws predictions with."""

import argparse
from pathlib import Path

from fastjepa.cli.options import add_command, non_negative_int, positive_int

DECODER_EXAMPLES = """examples:
  fastjepa decoder runs/demo --data fashion-mnist
  fastjepa decoder runs/cifar10 --data cifar10 --steps 4000 --output decoders/cifar10
  fastjepa visualize runs/demo --data fashion-mnist --what samples

The checkpoint's networks stay as they are. Stopped at any moment, the same command goes on."""


def register(commands) -> None:
    """Add `decoder` to the list of commands."""
    sub = add_command(
        commands, "decoder", run_decoder, "train a diffusion decoder of what the predictor says", DECODER_EXAMPLES
    )
    sub.add_argument(
        "checkpoint", type=Path, help="run directory (its latest checkpoint), a checkpoint, or an official .pth.tar"
    )
    sub.add_argument("--data", required=True, help="data set's name, or a directory with train/")
    sub.add_argument("--output", type=Path, metavar="DIR", help="default: decoder/ in the run directory, or here")
    sub.add_argument("--steps", type=positive_int, default=1500, help="optimizer steps (default 1500)")
    sub.add_argument("--batch", type=positive_int, default=64, help="images a step (default 64)")
    sub.add_argument("--seed", type=non_negative_int, default=0, help="of weights, images, masks and noise (default 0)")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def run_decoder(args: argparse.Namespace) -> None:
    """Train the decoder, or go on with the one there is, and print where its file lies."""
    from fastjepa.evals.inputs import open_subject
    from fastjepa.files import require_writable
    from fastjepa.visualize.decoder import DecoderSettings, decoder_folder, train_decoder
    from fastjepa.visualize.sheets import open_drawn_split

    subject = open_subject(args.checkpoint, args.device, cache=False)
    output = args.output or decoder_folder(subject)
    require_writable(output, folder=True)
    split = open_drawn_split(args.data, "train", None, args.seed)
    settings = DecoderSettings(args.steps, args.batch, seed=args.seed)
    print(train_decoder(subject, split, output, settings))
