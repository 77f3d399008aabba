"""The program `fastjepa`: its list of commands, and one sentence for every mistake."""

import argparse
import io
import os
import sys

from fastjepa.cli import convert, data, decoder, doctor, evaluate, masks, plan, report, sweep, train, verify, visualize
from fastjepa.errors import exit_code, is_users_to_mend, sentence_of

# These two must be set before torch is imported. By default its CPU threads spin while they wait for each other, and a loader
# process, or any other, then halts them for whole time slices: steps were measured up to 12 times slower on 2 busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Each new shape leaves a oneDNN primitive behind, and ragged steps have many shapes: the default, 1024, held gigabytes.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

# In the order of --help. Each adds itself with `register`, and imports what it needs, torch among it, when it is run.
COMMANDS = (train, verify, masks, evaluate, data, plan, sweep, convert, decoder, visualize, report, doctor)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code; an error gives one sentence and 2 or 1 (`--debug` shows the traceback)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as of stderr: a file's name may be no text of the terminal's
    root = build_parser()
    args, rest = root.parse_known_args(argv)  # overrides may stand between options, which argparse cannot say
    unknown = [word for word in rest if word.startswith("-") or "overrides" not in args]
    if unknown:
        root.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides += rest
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print(f"fastjepa {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug or not is_users_to_mend(error):
            raise
        said = sentence_of(error, args.command)
        sys.stderr.write(f"fastjepa {args.command}: {said}\n")  # in one piece: other ranks speak at the same moment
        if started := sys.modules.get("fastjepa.ranks.world"):  # not imported for this: without it there are no other ranks
            started.wait_for_ranks()
        return exit_code(error)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    root = argparse.ArgumentParser(prog="fastjepa", description="Pretrain and evaluate I-JEPA.")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.register(commands)
    return root
