"""The run directory that a path belongs to."""

from pathlib import Path


def run_directory(path: Path) -> Path:
    """Return the run directory of a checkpoint, or `path` itself."""
    path = path.resolve()
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent if path.name == "checkpoints" else path
