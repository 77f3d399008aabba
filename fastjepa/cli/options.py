"""Options that several commands share: how a command is added with its examples, and the types of values."""

import argparse
import math
import re
from collections.abc import Callable

from fastjepa.config.load import load_config
from fastjepa.config.schema import Config

POSITION_WAYS = ("computed", "interpolated", "scaled")  # the default first; as in model/positions.py, which imports torch


def add_command(commands, name: str, run, about: str, examples: str) -> argparse.ArgumentParser:
    """Add a command `name` that calls `run(args)`.

    `about` is its line in the list of commands; `examples` end its own help.
    """
    shown = {"help": about, "description": about[0].upper() + about[1:] + ".", "epilog": examples}
    sub = commands.add_parser(name, **shown, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    sub.set_defaults(run=run)
    return sub


def given_config(args: argparse.Namespace, *added: str) -> Config:
    """Return the config that `--config` names, the default one without it, with the overrides of the command line and those
    that are `added`.
    """
    return load_config(args.config, [*args.overrides, *added])


def positive_int(text: str) -> int:
    """Read a whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def positive_float(text: str) -> float:
    """Read a finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a finite number above 0")
    return float(text)


def non_negative_int(text: str) -> int:
    """Read a whole number from 0 on."""
    return 0 if int(text) == 0 else positive_int(text)


def some_of(*names: str) -> Callable[[str], list[str]]:
    """Return the type of an option that takes some of these names, separated by commas."""

    def chosen_names(text: str) -> list[str]:
        words = list(dict.fromkeys(text.split(",")))
        if unknown := [word for word in words if word not in names]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(names)}")
        return words

    return chosen_names


def byte_count(text: str) -> int:
    """Read a size such as 256MB (256e6 bytes), 512MiB (512 * 2^20) or 1GB."""
    match = re.fullmatch(r"([0-9.]+) ?([KMGT]?)(i?)B?", text, re.IGNORECASE)
    try:
        number, unit, binary = match.groups()
        count = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    except (AttributeError, ValueError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is no size such as 256MB, 512MiB or 1GB")
    return count


def patch_grid(text: str) -> tuple[int, int]:
    """Read the rows and columns of a grid of patches, such as 8x32."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is no grid such as 8x32, rows x columns")
    return int(match[1]), int(match[2])


def band_numbers(text: str) -> tuple[int, ...]:
    """Read the numbers of one band or three, such as 3,2,1."""
    bands = tuple(map(non_negative_int, text.split(",")))
    if len(bands) not in (1, 3):
        raise argparse.ArgumentTypeError(f"{text} are {len(bands)} bands; give one (grey) or three (red, green, blue)")
    return bands


def bands_option(sub: argparse.ArgumentParser) -> None:
    """Add --bands."""
    bands = "bands of a file, counted from 0, that show its image (default: the first three, or the first of one or two)"
    sub.add_argument("--bands", type=band_numbers, metavar="R,G,B", help=bands)


def positions_option(sub: argparse.ArgumentParser, where: str) -> None:
    """Add --positions; `where` begins its help with when it counts."""
    ways = "computed, scaled: sine-cosine at the grid's own or the trained coordinates; interpolated: the trained ones resized"
    sub.add_argument("--positions", choices=POSITION_WAYS, help=f"{where}{ways} (default {POSITION_WAYS[0]})")


CONFIG_HELP = "YAML file, or the name of one that comes with fastjepa: demo, cifar10, vit_base16 ..."
