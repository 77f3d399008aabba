"""MNIST-style idx files."""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastjepa.errors import SplitError, UserError

PREFIXES = {"train": "train", "test": "t10k"}  # of the files of a split


class IdxPair:
    """MNIST-style idx files, plain or gzipped, held in memory: `train-*` for split train, `t10k-*` for test.

    SplitError where none of `splits` is there; UserError where files are missing, damaged, or do not belong together.
    """

    def __init__(self, directory: str | Path, splits: Sequence[str] = ("train",), classes: tuple[str, ...] = ()):
        prefix = next((prefix for name, prefix in PREFIXES.items() if name in splits), None)
        if prefix is None:
            raise SplitError(f"{directory}: has no {splits[0]} split; its files t10k-* are the test split")
        self._images, self._file = _read_idx(Path(directory), f"{prefix}-images-idx3-ubyte", dims=3)
        self._labels, labels_file = _read_idx(Path(directory), f"{prefix}-labels-idx1-ubyte", dims=1)
        if len(self._labels) != len(self._images) or not len(self._images):
            raise UserError(f"{labels_file}: {len(self._labels)} labels for {len(self._images)} images; get both files again")
        self.classes = classes or tuple(map(str, range(int(self._labels.max()) + 1)))

    def __len__(self) -> int:
        return len(self._images)

    def name(self, i: int) -> str:
        """Return the file of images and the number of image i in it."""
        return f"{self._file}[{i}]"

    def read(self, i: int) -> np.ndarray:
        """Return the pixels of image i, (H, W) uint8."""
        return self._images[i]

    def label(self, i: int) -> int:
        """Return the number of image i's class."""
        return int(self._labels[i])


def _read_idx(directory: Path, stem: str, dims: int) -> tuple[np.ndarray, Path]:
    """Return the uint8 array of an idx file, and the file's path.

    An idx file of bytes is 0 0 8 dims, the shape as big-endian int32, and the values: two images of 28 x 28 pixels begin
    with 0 0 8 3, 0 0 0 2, 0 0 0 28, 0 0 0 28, so their header has 4 + 4 * 3 = 16 bytes.
    """
    path = idx_file(directory, stem)
    if path is None:
        raise UserError(f"{directory / stem}.gz: no such file; put the four idx files of the data set into {directory}")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); delete it and get it again") from error
    header = 4 + 4 * dims
    shape = np.frombuffer(raw[4:header], dtype=">i4").tolist()
    if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) != header + math.prod(shape):
        raise UserError(f"{path}: not an idx file of {dims} dimensions of bytes; delete it and get it again")
    return np.frombuffer(bytearray(raw), dtype=np.uint8, offset=header).reshape(shape), path


def idx_file(directory: Path, stem: str) -> Path | None:
    """Return the idx file of a name, plain or gzipped; None where there is none."""
    return next((path for path in (directory / stem, directory / f"{stem}.gz") if path.is_file()), None)


def idx_files(directory: Path) -> list[Path]:
    """Return the idx files of images and labels that are there."""
    names = (f"{prefix}-{kind}" for prefix in PREFIXES.values() for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    return list(filter(None, (idx_file(directory, name) for name in names)))


def holds_idx(directory: Path) -> bool:
    """Return whether a directory holds idx files of images; train-images-idx3-ubyte.txt is none."""
    return any(idx_file(directory, f"{prefix}-images-idx3-ubyte") for prefix in PREFIXES.values())
