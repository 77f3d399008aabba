"""Files and folders that are there whole or not at all, and the lock that lets one process at a time write a folder."""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastjepa.errors import UserError


@contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yield a path to write a file or a folder at; one rename brings it to `final` when the block ends without an error.

    The hidden path, `.<process>.<name of final>`, lies in the folder of `final`, which is made where it is missing. What is
    written is on the disk before the rename, so a kill or a full disk leaves either the earlier file or the new one. Files get
    the mode that the umask gives: safetensors makes them so that only their owner can read them.
    A folder at `final` that holds anything is not replaced: OSError.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    hidden = final.with_name(f".{os.getpid()}.{final.name}")
    try:
        yield hidden
        _follow_umask(hidden)
        # A folder may hold 60,000 files, for which an fsync each takes minutes.
        os.sync() if hidden.is_dir() else fsync(hidden)
        os.replace(hidden, final)
        fsync(final.parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True) if hidden.is_dir() else hidden.unlink(missing_ok=True)


def _follow_umask(path: Path) -> None:
    """Let a file, or every file below a folder, be read and written by whom the umask lets: 600 becomes 644 by 022."""
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        mode = stat.S_IMODE(file.lstat().st_mode)
        if file.is_file() and not file.is_symlink() and 0o666 & ~mask & ~mode:
            with suppress(PermissionError):  # of a file system that has one mode for all files
                file.chmod(mode | 0o666 & ~mask)


def require_writable(path: Path, folder: bool = False) -> None:
    """Raise UserError where a file, or a folder to put files into, cannot be written; nothing is made.

    The check is for the door: what a long work would otherwise find at its end.
    """
    place = path if folder else path.parent
    there = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
    try:
        if path.is_dir() and not folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another place") from error


def write_atomic(file: Path, content: bytes | str) -> None:
    """Write a file, text as UTF-8, so that it is there whole or not at all."""
    with atomic_path(file) as hidden:
        hidden.write_bytes(content.encode() if isinstance(content, str) else content)


def fsync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock of a file, which is made where it is missing; wait where another process holds it."""
    with _held(os.open(file, os.O_RDONLY | os.O_CREAT, 0o666), wait=True):
        yield


@contextmanager
def locked_folder(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a folder that is there; where another process holds it, wait, or raise BlockingIOError.

    Whoever holds it is the only one to write: what killed processes left under hidden names is deleted first.
    """
    with _held(os.open(folder, os.O_RDONLY), wait):
        for left in folder.glob(".[0-9]*.*"):
            left.unlink()
        yield


@contextmanager
def _held(descriptor: int, wait: bool) -> Iterator[None]:
    """Hold the lock of an open descriptor, and close it; the lock ends with its process, however that ends."""
    try:
        import fcntl  # not on Windows, where opening a directory has failed by now

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
