"""The command `fastjepa sweep`: train the arms of a study, probe them, and print what they say beside the paper's numbers."""

import argparse
import re
import sys
from pathlib import Path

from fastjepa.cli.options import add_command, positive_float, positive_int
from fastjepa.cores import usable_cores
from fastjepa.errors import UserError

STUDY_NAMES = ("masking", "small", "minutes", "dense", "scaling", "truncation")
SWEEP_EXAMPLES = """examples:
  fastjepa sweep --study masking --arms multi-block,rasterized,block,random
  fastjepa sweep --study small --jobs 2 --output runs/studies
  fastjepa sweep --study small --report
  fastjepa sweep --study truncation --seeds 1 --budget 20000 meta.depth=2
  fastjepa sweep --study minutes --minutes 20 --arms base,MAE

Stopped at any moment, the same command goes on: arm by arm, and inside an arm from its checkpoint; with --write DIR, what
the studies' files in DIR hold is not trained again. Settings at the end hold for all arms, unless an arm sets the same
key. An arm is trained anew when one of its settings, or the budget, has changed."""


def register(commands) -> None:
    """Add `sweep` to the list of commands."""
    about = "train and probe the arms of a study, and print them beside the paper's numbers"
    sub = add_command(commands, "sweep", run_sweep, about, SWEEP_EXAMPLES)
    sub.add_argument("--study", required=True, choices=STUDY_NAMES)
    sub.add_argument(
        "--output", type=Path, default=Path("runs/studies"), metavar="DIR", help="a folder an arm (default runs/studies)"
    )
    sub.add_argument(
        "--data", help="data set's name, or a directory with train/ and test/ (default: the study's, cifar10 or scenes)"
    )
    sub.add_argument("--seeds", type=positive_int, default=3, metavar="N", help="of each arm (default 3)")
    sub.add_argument(
        "--jobs",
        type=positive_int,
        metavar="N",
        help="arms side by side, one CPU thread each (default: a core each; 1 on a GPU)",
    )
    length = sub.add_mutually_exclusive_group()
    length.add_argument("--budget", type=positive_int, metavar="IMAGES", help="that an arm sees (default: the study's)")
    minutes = "that an arm trains for on one core, counted by what its images cost beside the base's (default: the study's)"
    length.add_argument("--minutes", type=positive_float, metavar="M", help=minutes)
    sub.add_argument("--arms", type=arm_names, metavar="A,B", help="these alone, no space after the comma (default: all)")
    sub.add_argument("--report", action="store_true", help="train nothing; print what there is")
    written = "where rows, table and plot are written, <study>.json, .md, .svg and .png (default: --output)"
    sub.add_argument("--write", type=Path, metavar="DIR", help=written)
    pages = "Markdown pages whose block `<!-- study: NAME -->` ... `<!-- end -->` becomes the table"
    sub.add_argument("--pages", type=Path, nargs="+", default=[], metavar="FILE", help=pages)
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of every arm")


def arm_names(text: str) -> list[str]:
    """Split names of arms at commas; a comma and a space belong to a name."""
    return re.split(",(?! )", text)


def run_sweep(args: argparse.Namespace) -> int:
    """Train the arms that have no row yet, and print and write the table of the study."""
    from rich.console import Console

    from fastjepa.files import require_writable
    from fastjepa.studies.report import (
        arm_results,
        fill_page,
        page_block,
        picture_markdown,
        show_study,
        study_markdown,
        write_study,
    )
    from fastjepa.studies.sweep import STUDIES, Sweep, check_data, job_rows, plan_jobs, run_jobs

    if args.arms and (args.write or args.pages):
        raise UserError("--arms: a part of a table is shown, not kept; leave --write and --pages out")
    study, console = STUDIES[args.study], Console(width=None if sys.stdout.isatty() else 130)
    study = study._replace(minutes=None if args.budget else args.minutes or study.minutes)
    data = args.data or study.data
    for page in args.pages:
        page_block(page, args.study)
    asked = Sweep(args.study, args.output, data, args.seeds, args.budget, args.arms, args.overrides, args.minutes)
    folder, failed = args.write or args.output, []
    require_writable(folder, folder=True)
    jobs = plan_jobs(asked)
    if not args.report:
        check_data(study, data)
        failed = run_jobs(jobs, args.jobs or jobs_at_once(study.minutes is not None), console, folder)
    found = arm_results(study.named(args.arms), job_rows(jobs, folder), study.measures.ranked)
    show_study(study, found, console)
    if args.arms is None:
        files = write_study(study, args.study, found, folder)
        console.print(f"written: {', '.join(map(str, files))}", highlight=False, soft_wrap=True)
        for page in args.pages:
            fill_page(page, args.study, picture_markdown(files, page) + study_markdown(study, found))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(jobs)} runs failed, {failed[0]} first; log.txt there says why, and the command tries again"
        )
    return 0


def jobs_at_once(on_cpu: bool) -> int:
    """Return how many arms run side by side by default: one on a GPU, else one a core."""
    import torch

    return 1 if torch.cuda.is_available() and not on_cpu else usable_cores()
