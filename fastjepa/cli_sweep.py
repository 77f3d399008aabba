"""The command `fastjepa sweep`: train the arms of a study, probe them, and print what they say beside the paper's numbers."""

import argparse
import os
import re
import sys
from pathlib import Path

from fastjepa.arguments import add, positive
from fastjepa.config import ConfigError

STUDIES = ("masking", "small", "scaling", "truncation")
EXAMPLES = """examples:
  fastjepa sweep --study masking --arms multi-block,rasterized,block,random
  fastjepa sweep --study small --jobs 2 --output runs/studies
  fastjepa sweep --study small --report
  fastjepa sweep --study truncation --seeds 1 --budget 20000 meta.depth=2

Stopped at any moment, the same command goes on: arm by arm, and inside an arm from its checkpoint; with --write DIR, what
the studies' files in DIR hold is not trained again. Settings at the end
are for all arms, before their own. An arm is trained anew when one of its settings, or the budget, has changed."""


def register(commands) -> None:
    about = "train and probe the arms of a study, and print them beside the paper's numbers"
    sub = add(commands, "sweep", sweep, about, EXAMPLES)
    sub.add_argument("--study", required=True, choices=STUDIES)
    sub.add_argument(
        "--output", type=Path, default=Path("runs/studies"), metavar="DIR", help="a folder an arm (default runs/studies)"
    )
    sub.add_argument(
        "--data", default="cifar10", help="data set's name, or a directory with train/ and test/ (default cifar10)"
    )
    sub.add_argument("--seeds", type=positive, default=3, metavar="N", help="of each arm (default 3)")
    sub.add_argument(
        "--jobs", type=positive, metavar="N", help="arms side by side, one CPU thread each (default: a core each; 1 on a GPU)"
    )
    sub.add_argument("--budget", type=positive, metavar="IMAGES", help="that an arm sees (default: the study's)")
    sub.add_argument("--arms", type=names, metavar="A,B", help="these alone, no space after the comma (default: all)")
    sub.add_argument("--report", action="store_true", help="train nothing; print what there is")
    written = "where rows, table and plot are written, <study>.json, .md, .svg and .png (default: --output)"
    sub.add_argument("--write", type=Path, metavar="DIR", help=written)
    pages = "Markdown pages whose block `<!-- study: NAME -->` ... `<!-- end -->` becomes the table"
    sub.add_argument("--pages", type=Path, nargs="+", default=[], metavar="FILE", help=pages)
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of every arm")


def names(text: str) -> list[str]:
    """Of arms, some of which have a comma and a space in them."""
    return re.split(",(?! )", text)


def sweep(args: argparse.Namespace) -> int:
    from rich.console import Console

    from fastjepa.evals.subject import open_splits
    from fastjepa.studies import report
    from fastjepa.studies import sweep as sweeps

    study, console = sweeps.STUDIES[args.study], Console(width=None if sys.stdout.isatty() else 130)
    jobs = sweeps.plan(args.study, args.output, args.data, args.seeds, args.budget, args.arms, args.overrides)
    folder, failed = args.write or args.output, []
    if not args.report:
        open_splits(args.data, None, None, 0)  # refused here, once, rather than by every arm
        failed = sweeps.sweep(jobs, args.jobs or side_by_side(), console, folder)
    found = report.lines(study.named(args.arms), sweeps.rows(jobs, folder))
    report.show(study, found, console)
    if args.arms is None:  # a part of a table is shown, not kept
        files = report.write(study, args.study, found, folder)
        console.print(f"written: {', '.join(map(str, files))}", highlight=False, soft_wrap=True)
        for page in args.pages:
            report.fill(page, args.study, report.picture(files, page) + report.markdown(study, found))
    if failed:
        raise ConfigError(
            f"{len(failed)} of {len(jobs)} runs failed, {failed[0]} first; log.txt there says why, and the command tries again"
        )
    return 0


def side_by_side() -> int:
    import torch

    return 1 if torch.cuda.is_available() else os.cpu_count() or 1
