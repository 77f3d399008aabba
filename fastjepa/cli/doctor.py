"""The command `fastjepa doctor`: what would run on this machine, and what is missing."""

import argparse
import json
from pathlib import Path

from fastjepa.cli.options import CONFIG_HELP, add_command, given_config
from fastjepa.errors import UserError

DOCTOR_EXAMPLES = """examples:
  fastjepa doctor
  fastjepa doctor --config configs/vit_huge14.yaml data.num_workers=16"""


def register(commands) -> None:
    """Add `doctor` to the list of commands."""
    about = "what would run on this machine, and what is missing"
    sub = add_command(commands, "doctor", run_doctor, about, DOCTOR_EXAMPLES)
    sub.add_argument("--config", type=Path, help=f"of a run that shall fit into shared memory: {CONFIG_HELP}")
    sub.add_argument("--json", action="store_true")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings in place of the file's")


def run_doctor(args: argparse.Namespace) -> None:
    """Print the survey of this machine as a table, or as JSON."""
    import torch
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fastjepa.cli.survey import survey_machine
    from fastjepa.loader.loader import batch_bytes, crew_of

    if args.overrides and not args.config:
        raise UserError(f"{args.overrides[0]}: of which config? give it with --config")
    config = given_config(args)
    found = survey_machine(crew_of(config, torch.device("cpu")), batch_bytes(config))
    if args.json:
        print(json.dumps(found))
        return
    table = Table("", "what", "state", "why", box=None)
    for topic, rows in found.items():
        for number, row in enumerate(rows):
            table.add_row(topic if number == 0 else "", *map(escape, row), end_section=number == len(rows) - 1)
    Console().print(table)
