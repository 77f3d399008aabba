"""The command `fastjepa masks`: statistics and a picture of a config's masks."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from fastjepa.cli.options import CONFIG_HELP, add_command, positive_int
from fastjepa.config.load import load_config
from fastjepa.config.schema import Config

PICTURED_IMAGES = 8  # rows of the picture, at most
MASKS_EXAMPLES = """examples:
  fastjepa masks --config configs/vit_base16.yaml
  fastjepa masks --config configs/demo.yaml --picture masks.png"""


def register(commands) -> None:
    """Add `masks` to the list of commands."""
    sub = add_command(commands, "masks", run_masks, "statistics and a picture of a config's masks", MASKS_EXAMPLES)
    sub.add_argument("--config", required=True, type=Path, help=CONFIG_HELP)
    sub.add_argument("--groups", type=positive_int, default=1000, help="independently sized groups to draw (default 1000)")
    sub.add_argument(
        "--picture", type=Path, metavar="PNG", help="where the picture goes (default masks.png); needs the config's data"
    )
    sub.add_argument("--json", action="store_true", help="print the statistics as JSON; no picture unless --picture")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings in place of the file's")


def run_masks(args: argparse.Namespace) -> None:
    """Print the statistics, and draw the picture where the config names images."""
    from fastjepa.files import require_writable
    from fastjepa.masks.check import check_masks
    from fastjepa.masks.statistics import mask_statistics

    config = load_config(args.config, args.overrides)
    if args.picture:
        require_writable(args.picture)
    check_masks(config.mask, config.grid, config.runtime.seed, config.data.batch_size)
    statistics = mask_statistics(config.mask, config.grid, config.runtime.seed, args.groups)
    if args.json:
        print(json.dumps(statistics))
    else:
        for name, value in statistics.items():
            print(f"{name:16} {' '.join(f'{v:.2f}' for v in value) if isinstance(value, list) else f'{value:.4g}'}")
    named = config.data.source or config.data.root_path
    if args.picture or (named and not args.json):
        save_masks_picture(config, args.picture or Path("masks.png"))
        print(f"picture: {args.picture or 'masks.png'}", file=sys.stderr)
    elif not args.json:
        print("no picture: the config names no images; add data.source=DIR", file=sys.stderr)


def save_masks_picture(config: Config, path: Path) -> None:
    """Write a PNG of the first images of a run, cropped as it will see them, with their masks."""
    from fastjepa.data.sources import open_source
    from fastjepa.loader.micro_batches import MicroBatches
    from fastjepa.masks.draw import draw_masks
    from fastjepa.visualize.images import masks_sheet, save_picture

    source = open_source(config.data)
    count = min(PICTURED_IMAGES, len(source))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=count),
                                 runtime=dataclasses.replace(config.runtime, micro_batch=None))  # fmt: skip
    images = MicroBatches(config, source, rank=0, ranks=1)[0].images.permute(0, 2, 3, 1)
    drawn = draw_masks(config.mask, config.grid, config.runtime.seed, 0, range(count), count)
    save_picture(masks_sheet(images.expand(-1, -1, -1, 3).numpy(), *drawn, config.grid), path)
