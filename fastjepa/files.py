"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_atomic(file: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    hidden = file.with_name(f".{file.name}.{os.getpid()}")
    with open(hidden, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    hidden.replace(file)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
