"""Image files in folders."""

import errno
import logging
import mmap
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastjepa.data.endings import ARRAY_ENDINGS, PACKED_ENDINGS, UNPACK, image_endings, passed_over
from fastjepa.errors import UserError

log = logging.getLogger(__name__)

FORMATS = (
    "image files at any depth, .npy or .npz files, *.tar shards, *.parquet files with an image column, or MNIST-style idx files"
)


class ImageFolder:
    """Image files at any depth below `root`, in sorted order; hidden files and links to a folder above are passed over.

    Where no other image lies there, .npy and .npz files are the images.

    Labels are the first-level folders when every image lies in one. UserError for a folder without images.
    """

    def __init__(self, root: str | Path):
        self.root = str(root)
        self.unreadable: list[tuple[str, str]] = []  # folders passed over, each with the reason
        passed: Counter[str] = Counter()
        paths = sorted(image_files(self.root, self.unreadable, passed))
        if not paths and self.unreadable:
            raise UserError("{}: cannot be read ({}); let its folders be read and entered".format(*self.unreadable[0]))
        if not paths:
            raise UserError(_nothing_in(Path(root)))
        if passed:
            log.warning("%s: %s", root, passed_over(passed))
        # One array: lists of a million strings would be copied into every worker as their reference counts change.
        self._paths = np.array([os.fsencode(path) for path in paths])
        labelled = all(os.sep in path for path in paths)
        folders = [path.split(os.sep, 1)[0] for path in paths] if labelled else []
        self.classes = tuple(sorted(set(folders)))
        self._labels = np.unique(folders, return_inverse=True)[1] if labelled else None

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, i: int) -> str:
        """Return the path of image i."""
        return os.path.join(self.root, os.fsdecode(self._paths[i]))

    def read(self, i: int) -> bytes | mmap.mmap:
        """Return the bytes of image i, those of a .npy mapped into memory, so that what is not looked at is not read.

        OSError where it is gone, cannot be read, or is a pipe or a device.
        """
        with open(self.name(i), "rb", buffering=0, opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "a pipe or a device, not a file", self.name(i))
            if status.st_size and self.name(i).lower().endswith(".npy"):
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writable, as torch wants it; the file is not
            return file.read()

    def label(self, i: int) -> int | None:
        """Return the number of image i's class; None without labels."""
        return None if self._labels is None else int(self._labels[i])


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a named pipe at once too, where a plain open would wait for whoever writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def image_files(root: str, unreadable: list[tuple[str, str]], passed: Counter[str]) -> list[str]:
    """Return the paths of all image files below `root`, relative to it, in no order; of arrays, where there is no other image.

    Links and folders passed over are logged. Folders that cannot be read are added to `unreadable`, with the reason, and files
    of other kinds to `passed`, by ending; the index of a tar, a .npz beside it, is of another kind.
    """
    images, arrays = [], []
    for folder, names in _files_below(root, unreadable):
        tars = {name for name in names if name.endswith(".tar")}
        for name in names:
            stem, ending = os.path.splitext(name)
            ending = ending.lower()
            path = name if folder == "." else os.path.join(folder, name)
            if ending in image_endings():
                images.append(path)
            elif ending in ARRAY_ENDINGS and f"{stem}.tar" not in tars:
                arrays.append((path, ending))
            else:
                passed[ending] += 1
    if images:
        passed.update(ending for _, ending in arrays)
    return images or [path for path, _ in arrays]


def _files_below(root: str, unreadable: list[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below `root`, relative to it, with the names of its files, hidden ones left out."""

    def identity(folder: str) -> tuple[int, int] | None:
        try:
            status = os.stat(folder)
        except OSError as error:
            return cannot_be_read(error)
        return status.st_dev, status.st_ino

    def cannot_be_read(error: OSError) -> None:
        unreadable.append((error.filename, error.strerror))
        log.warning("%s: passed over (%s)", error.filename, error.strerror)

    above = {root: frozenset([identity(root)])}  # of each folder still to come: itself and those it lies in
    for folder, folders, files in os.walk(root, followlinks=True, onerror=cannot_be_read):
        chain, inside = above.pop(folder), os.path.relpath(folder, root)
        found = {os.path.join(folder, name): name for name in folders if not name.startswith(".")}
        own = {path: number for path in found if (number := identity(path))}
        fresh = {path: chain | {number} for path, number in own.items() if number not in chain}
        for path in own.keys() - fresh.keys():
            log.warning("%s: passed over, a link to a folder it lies in", path)
        above |= fresh
        folders[:] = [found[path] for path in fresh]
        yield inside, [name for name in files if not name.startswith(".")]


def _nothing_in(root: Path) -> str:
    """Return the sentence on a folder without images: where tars or tables lie in it, and what cannot be read."""
    for ending, kind in ((".tar", "tar shards"), (".parquet", "Parquet files")):
        below = sorted(root.glob(f"*/*{ending}")) or sorted(root.glob(f"*/*/*{ending}"))
        if below:
            depth = "/".join("*" * (len(below[0].relative_to(root).parts) - 1))
            return (f"{root}: no image files in it, but {len(below)} {kind} further down; give {below[0].parent}, or all by "
                    f"{root}/{depth}/*{ending}")  # fmt: skip
    packed = sorted(path.name for path in root.iterdir() if path.name.lower().endswith(PACKED_ENDINGS))
    if packed:
        return f"{root}: {len(packed)} compressed archives in it ({packed[0]}), and no images; {UNPACK}"
    return f"{root}: no image files in it; give a directory that holds {FORMATS}"
