"""The command `fastjepa verify`: replay reference trajectories and compare every quantity."""

import argparse
import json

from fastjepa.cli.options import add_command

VERIFY_EXAMPLES = """example:
  fastjepa verify tests/reference/*.safetensors"""


def register(commands) -> None:
    """Add `verify` to the list of commands."""
    sub = add_command(
        commands, "verify", run_verify, "replay reference trajectories and compare every quantity", VERIFY_EXAMPLES
    )
    sub.add_argument("files", nargs="+", metavar="FILE")
    sub.add_argument("--json", action="store_true")


def run_verify(args: argparse.Namespace) -> int:
    """Print the largest relative error of each quantity; return 1 where one is above its tolerance."""
    from fastjepa.run.verify import errors_pass, tolerance_of, verify_file

    results = [
        {"file": file, "max_rel_err": errors, "ok": errors_pass(errors)}
        for file in args.files
        for errors in [verify_file(file)]
    ]
    if args.json:
        print(json.dumps(results, indent=1))
    for result in [] if args.json else results:
        print(result["file"])
        for name, error in result["max_rel_err"].items():
            print(f"  {name:18} {error:.1e}  {'ok' if error <= tolerance_of(name) else f'above {tolerance_of(name):.0e}'}")
    return 0 if all(result["ok"] for result in results) else 1
