"""The run directory: the one that a path belongs to, and the lock by which one run at a time writes into it."""

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from fastjepa.errors import UserError
from fastjepa.ranks.collectives import text_of_main

LOCK_FILE = ".run-lock"


def run_directory(path: Path) -> Path:
    """Return the run directory of a checkpoint, or `path` itself."""
    path = path.resolve()
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent if path.name == "checkpoints" else path


@contextmanager
def held_by_ranks(output: Path, is_main: bool) -> Iterator[None]:
    """Hold a run directory for the ranks of a run, whose main one locks it; UserError on all of them where it cannot."""
    with ExitStack() as held:
        refused = ""
        if is_main:
            try:
                held.enter_context(held_directory(output))
            except UserError as error:
                refused = str(error)
        if refused := text_of_main(refused):
            raise UserError(refused)
        yield


@contextmanager
def held_directory(output: Path) -> Iterator[None]:
    """Make a run directory and lock it; UserError where another process holds it, or where it cannot be written.

    The lock ends with its process, however that ends, and its children do not inherit it. A directory that was made here,
    and into which nothing was written, is removed again.
    """
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / LOCK_FILE).open("a+")
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); give another directory with --output") from error
    with file:
        _lock(file, output)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            if made and os.listdir(output) == [LOCK_FILE]:
                with suppress(OSError):
                    (output / LOCK_FILE).unlink()
                    output.rmdir()


def _lock(file: TextIO, output: Path) -> None:
    """Lock an open file for this process; UserError where another has, a warning where the file system cannot lock."""
    try:
        import fcntl  # not on Windows

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            holder = file.read() or "another process"
            raise UserError(f"{output}: a run is writing into it ({holder}); wait for its end, or give another directory with "
                            "--output; the processes of one run are started by torchrun or deepspeed") from error  # fmt: skip
        said = "%s: cannot be locked (%s); start no second run in it"
        logging.getLogger(__name__).warning(said, output, error.strerror)
