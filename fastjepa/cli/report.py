"""The command `fastjepa report`: one HTML page of a run, or of several side by side."""

import argparse
from pathlib import Path

from fastjepa.cli.options import add_command, bands_option

REPORT_EXAMPLES = """examples:
  fastjepa report runs/demo
  fastjepa report runs/demo runs/cifar10 --output compared.html

The page holds everything it shows, needs no network, and can be sent, printed and kept. It shows a run as it stands: run
the command again for a newer page."""


def register(commands) -> None:
    """Add `report` to the list of commands."""
    sub = add_command(commands, "report", run_report, "one HTML page of a run, or of several side by side", REPORT_EXAMPLES)
    sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory; it may still be training")
    out = "where the page goes (default: RUN/report.html, or report.html here for several runs)"
    sub.add_argument("--output", type=Path, metavar="FILE", help=out)
    bands_option(sub)
    sub.add_argument("--no-pictures", action="store_true", help="leave out masks, principal components and other pictures")


def run_report(args: argparse.Namespace) -> None:
    """Write the page, and print where it lies."""
    from rich.console import Console

    from fastjepa.report.page import write_page

    file = args.output or (args.runs[0] / "report.html" if len(args.runs) == 1 else Path("report.html"))
    with Console(stderr=True).status("reading and drawing"):
        write_page(args.runs, file, not args.no_pictures, args.bands)
    print(file)
