"""The command `fastjepa doctor`: what would run on this machine, and what is missing."""

import argparse
import json

from fastjepa.cli.options import add_command

DOCTOR_EXAMPLES = """example:
  fastjepa doctor"""


def register(commands) -> None:
    """Add `doctor` to the list of commands."""
    about = "what would run on this machine, and what is missing"
    add_command(commands, "doctor", run_doctor, about, DOCTOR_EXAMPLES).add_argument("--json", action="store_true")


def run_doctor(args: argparse.Namespace) -> None:
    """Print the survey of this machine as a table, or as JSON."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fastjepa.cli.survey import survey_machine

    found = survey_machine()
    if args.json:
        print(json.dumps(found))
        return
    table = Table("", "what", "state", "why", box=None)
    for topic, rows in found.items():
        for number, row in enumerate(rows):
            table.add_row(topic if number == 0 else "", *map(escape, row), end_section=number == len(rows) - 1)
    Console().print(table)
