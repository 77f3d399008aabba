"""Directories of checkpoints: each counts once its manifest of sizes and hashes, written last, is there after one rename."""

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from fastjepa.errors import CheckpointError
from fastjepa.files import fsync
from fastjepa.ranks.collectives import this_rank

MANIFEST = "manifest.json"
# A checkpoint on its way in or out is ".tmp-<name>@<host>@<pid>"; one that a rewrite has set aside keeps its place among
# the complete ones, under "<name>.replaced", until its successor is there.
HIDDEN_PREFIX, REPLACED_SUFFIX = ".tmp-", ".replaced"
FOREIGN_SECONDS = 24 * 3600  # after which an unfinished directory of another machine counts as abandoned


def complete_checkpoints(root: str | Path, tag: str | None = "jepa") -> list[Path]:
    """Return the checkpoints with a manifest whose sizes all match, by rising step; `tag` None takes any tag."""
    found: dict[tuple[int, str], Path] = {}
    for path in named_checkpoints(root, tag):  # a name sorts before the same name with a suffix
        if _is_complete(path):
            found.setdefault((step_of(path), path.name.removesuffix(REPLACED_SUFFIX)), path)
    return [found[key] for key in sorted(found)]


def named_checkpoints(root: str | Path, tag: str | None) -> list[Path]:
    """Return the directories that have a checkpoint's name, complete or not, sorted by name; `tag` None takes any tag."""
    pattern = re.compile(rf"({'.+' if tag is None else re.escape(tag)})-(\d{{8,}})({re.escape(REPLACED_SUFFIX)})?")
    return [path for path in sorted(Path(root).glob("[!.]*")) if pattern.fullmatch(path.name)]


def latest_checkpoint(root: str | Path, tag: str | None = "jepa") -> Path | None:
    """Return the complete checkpoint of the highest step, or None; a warning names each later one and what it lacks."""
    latest = next(reversed(complete_checkpoints(root, tag)), None)
    later = [path for path in named_checkpoints(root, tag) if latest and step_of(path) > step_of(latest)]
    for path in later:
        _warn_once(f"{path}: passed over, {lack_of(path)}; {latest.name} is the newest complete checkpoint")
    return latest


@cache
def _warn_once(sentence: str) -> None:
    """Warn, on one rank, of a thing that is looked at several times."""
    if this_rank() == 0:
        logging.getLogger(__name__).warning("%s", sentence)


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that `path` means: itself, or the latest of a run directory or of its `checkpoints`.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    for root in (path / "checkpoints", path):
        if newest := latest_checkpoint(root, tag=None):
            return newest
    damaged = [
        f" ({found.name}: {lack_of(found)})" for root in (path / "checkpoints", path) for found in named_checkpoints(root, None)
    ]
    raise CheckpointError(
        f"{path}: holds no complete checkpoint{damaged[-1] if damaged else ''}; name a run directory, a checkpoint in it or a "
        ".safetensors file"
    )


def verify_checkpoint(path: str | Path, names: Iterable[str] | None = None) -> None:
    """Compare size and SHA-256 of the manifest's files (or of `names` among them); CheckpointError at the first difference."""
    path = Path(path)
    listed = manifest_entries(path)
    if listed is None:
        raise CheckpointError(
            f"{path / MANIFEST}: missing or unreadable, so {path.name} is incomplete; use an earlier checkpoint"
        )
    for name in listed if names is None else names:
        file = path / name
        if name not in listed or not file.is_file():
            raise CheckpointError(f"{file}: expected, and not there; use an earlier checkpoint")
        expected = listed[name]
        # The size first: it tells a truncated file without reading it.
        for what, found in (("bytes", lambda file: file.stat().st_size), ("sha256", _sha256)):
            if (value := found(file)) != expected[what]:
                raise CheckpointError(
                    f"{file}: damaged, expected {what} {expected[what]} and found {value}; remove {path} to use an earlier one"
                )


def manifest_entries(path: Path) -> dict[str, dict[str, Any]] | None:
    """Return {file: {"bytes": its size, "sha256": its hash}} of a checkpoint's manifest; None where it cannot be read."""
    try:
        return json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def lack_of(path: Path) -> str | None:
    """Return what a checkpoint lacks by its manifest, without reading the files; None for a complete one."""
    listed = manifest_entries(path)
    if listed is None:
        return f"its {MANIFEST} is missing or unreadable"
    for name, entry in listed.items():
        file = path / name
        if not file.is_file():
            return f"its {name} is missing"
        if (size := file.stat().st_size) != entry["bytes"]:
            return f"its {name} has {size} of {entry['bytes']} bytes"
    return None


def _is_complete(path: Path) -> bool:
    return lack_of(path) is None


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name: 120 of "jepa-00000120"."""
    return int(path.name.removesuffix(REPLACED_SUFFIX).rpartition("-")[2])


def settle_files(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Wait until files are on the disk, and return their entries in the manifest."""
    listed = {}
    for file in files:
        file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
        fsync(file)
        listed[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    return listed


def publish_checkpoint(hidden: Path, final: Path) -> None:
    """Rename a finished directory to its name; a checkpoint of that name that is equal stays, another one is replaced.

    What is replaced is set aside first, where it still counts, so that a kill between the two renames loses nothing.
    """
    aside = final.with_name(final.name + REPLACED_SUFFIX)
    if final.exists():
        if _same(hidden, final):
            return
        if _is_complete(final):
            os.replace(final, aside)
        else:
            discard_checkpoint(final)
    os.replace(hidden, final)
    fsync(final.parent)
    discard_checkpoint(aside)


def _same(new: Path, old: Path) -> bool:
    """Return whether two checkpoints hold the same files, and the old one's are as its manifest says."""
    if manifest_entries(new) != manifest_entries(old):
        return False
    try:
        verify_checkpoint(old)
    except CheckpointError:  # damaged since: the new one takes its place
        return False
    return True


def discard_checkpoint(path: Path) -> None:
    """Hide a checkpoint by one rename, then delete it: a kill half-way leaves nothing under a checkpoint's name."""
    if path.exists():
        hidden = hidden_name(path.with_name("old-" + path.name))
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def hidden_name(final: Path) -> Path:
    """Return the name under which this process writes or deletes a checkpoint."""
    return final.with_name(f"{HIDDEN_PREFIX}{final.name}@{socket.gethostname()}@{os.getpid()}")


def sweep_leftovers(root: Path) -> None:
    """Delete what writers that are no more have left, and set-aside checkpoints whose successor is there."""
    for aside in root.glob(f"*{REPLACED_SUFFIX}"):
        if _is_complete(aside.with_name(aside.name.removesuffix(REPLACED_SUFFIX))):
            discard_checkpoint(aside)
    for path in root.glob(f"{HIDDEN_PREFIX}*@*@*"):
        _, host, pid = path.name.rsplit("@", 2)
        if host == socket.gethostname():
            gone = pid == str(os.getpid()) or not _alive(int(pid))
        else:
            gone = time.time() - path.stat().st_mtime > FOREIGN_SECONDS
        if gone:
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
