"""The command `fastjepa masks`: statistics and a picture of a config's masks."""

import argparse
import json
import sys
from pathlib import Path

from fastjepa.cli.options import CONFIG_HELP, add_command, given_config, positive_int

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
    from fastjepa.masks.layouts import Masking
    from fastjepa.masks.statistics import mask_statistics

    config = given_config(args)
    if args.picture:
        require_writable(args.picture)
    check_masks(Masking.of(config), config.data.batch_size)
    statistics = mask_statistics(Masking.of(config), args.groups)
    if args.json:
        print(json.dumps(statistics))
    else:
        for name, value in statistics.items():
            print(f"{name:16} {' '.join(f'{v:.2f}' for v in value) if isinstance(value, list) else f'{value:.4g}'}")
    named = config.data.source or config.data.root_path
    if args.picture or (named and not args.json):
        from fastjepa.data.sources import open_source
        from fastjepa.loader.loader import batch_recipe
        from fastjepa.visualize.images import save_picture
        from fastjepa.visualize.sheets import run_masks_sheet

        sheet = run_masks_sheet(batch_recipe(config), open_source(config.data.address), PICTURED_IMAGES)
        save_picture(sheet, args.picture or Path("masks.png"))
        print(f"picture: {args.picture or 'masks.png'}", file=sys.stderr)
    elif not args.json:
        print("no picture: the config names no images; add data.source=DIR", file=sys.stderr)
