"""The command `fastjepa train`: pretrain from images to a checkpoint."""

import argparse
import time
from pathlib import Path

from fastjepa.cli.options import CONFIG_HELP, add_command, given_config, positive_int

TRAIN_EXAMPLES = """examples:
  fastjepa train --config demo
  fastjepa train --config configs/vit_base16.yaml data.source=/data/imagenet runtime.micro_batch=64
  torchrun --nproc_per_node 8 fastjepa/train.py --config configs/vit_huge14.yaml --output runs/h14
  deepspeed fastjepa/train.py --config configs/vit_huge14.yaml"""


def register(commands) -> None:
    """Add `train` to the list of commands."""
    sub = add_command(commands, "train", run_train, "pretrain from images to a checkpoint", TRAIN_EXAMPLES)
    sub.add_argument("--config", required=True, type=Path, help=CONFIG_HELP)
    sub.add_argument("--output", type=Path, help="run directory (default: logging.folder, or runs/<config>-<time>)")
    sub.add_argument("--max-steps", type=positive_int, metavar="N", help="save and stop after N optimizer steps in all")
    sub.add_argument(
        "--resume", choices=("auto", "must", "never"), default="auto", help="from the latest checkpoint in --output"
    )
    sub.add_argument("--init", type=Path, metavar="FILE", help="weights to start from: a .safetensors file, checkpoint or run")
    extra = "what DeepSpeed shall do beyond the config: offloading, buckets, overlap (JSON)"
    sub.add_argument("--deepspeed_config", "--deepspeed-config", type=Path, metavar="FILE", help=extra)
    sub.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers append it
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings in place of the file's")


def run_train(args: argparse.Namespace) -> None:
    """Train on this rank; all ranks write into the directory that the first one names."""
    from fastjepa.ranks.collectives import text_of_main
    from fastjepa.ranks.world import check_launch, join_world
    from fastjepa.run.directory import held_by_ranks
    from fastjepa.train import train

    config = given_config(args)
    named = args.output or (config.logging.folder and Path(config.logging.folder))
    fresh = Path("runs") / f"{args.config.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_launch()
    world = join_world(config.runtime.device, 2 * config.runtime.timeout)
    output = named or Path(text_of_main(str(fresh)))
    with held_by_ranks(output, world.is_main):
        train(config, output, args.max_steps, args.resume, args.init, args.deepspeed_config)
