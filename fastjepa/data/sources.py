"""Sources of images: a folder, tar shards, Parquet files, idx files. They know files and labels, and nothing of order.

A source is a numbered set of images with five parts:

- `len(source)`, how many there are;
- `read(i)`, the bytes of an encoded file, or pixels (H, W) or (H, W, 3) uint8; OSError where it cannot be read;
- `name(i)`, where image i lies;
- `label(i)`, an int, or None without labels;
- `classes`, the names of the labels, () without labels.
"""

import errno
import glob
import gzip
import logging
import math
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastjepa.config.schema import DataConfig
from fastjepa.data.endings import image_endings, passed_over
from fastjepa.data.parquet import ParquetImages, nested_tables
from fastjepa.data.prepare.catalog import DATASETS, closest_dataset, find_dataset
from fastjepa.data.remote_files import is_remote
from fastjepa.data.remote_shards import RemoteShards, open_directory, open_tars
from fastjepa.data.splits import only_train, parquet_split, split_folder, stand_in_splits
from fastjepa.data.tar_shards import SHARDS_PLAN, TarShards, open_shards, read_manifest, tars_in
from fastjepa.errors import ConfigError, UserError

log = logging.getLogger(__name__)

FORMATS = "image files at any depth, *.tar shards, *.parquet files with an image column, or MNIST-style idx files"


class ImageFolder:
    """Image files at any depth below `root`, in sorted order; hidden files and links to a folder above are passed over.

    Labels are the first-level folders when every image lies in one. UserError for a folder without images.
    """

    def __init__(self, root: str | Path):
        self.root = str(root)
        self.unreadable: list[tuple[str, str]] = []  # folders passed over, each with the reason
        paths = sorted(_image_files(self.root, self.unreadable))
        if not paths and self.unreadable:
            raise UserError("{}: cannot be read ({}); let its folders be read and entered".format(*self.unreadable[0]))
        if not paths:
            raise UserError(f"{root}: no image files in it; give a directory that holds {FORMATS}")
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

    def read(self, i: int) -> bytes:
        """Return the bytes of image i; OSError where it is gone, cannot be read, or is a pipe or a device."""
        with open(self.name(i), "rb", buffering=0, opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "a pipe or a device, not a file", self.name(i))
            return file.read()

    def label(self, i: int) -> int | None:
        """Return the number of image i's class; None without labels."""
        return None if self._labels is None else int(self._labels[i])


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a named pipe at once too, where a plain open would wait for whoever writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _image_files(root: str, unreadable: list[tuple[str, str]]) -> Iterator[str]:
    """Yield the paths of all image files below `root`, relative to it; what is passed over is logged.

    Folders that cannot be read are added to `unreadable`, with the reason.
    """

    def identity(folder: str) -> tuple[int, int] | None:
        try:
            status = os.stat(folder)
        except OSError as error:
            return cannot_be_read(error)
        return status.st_dev, status.st_ino

    def cannot_be_read(error: OSError) -> None:
        unreadable.append((error.filename, error.strerror))
        log.warning("%s: passed over (%s)", error.filename, error.strerror)

    passed: Counter[str] = Counter()
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
        for name in (name for name in files if not name.startswith(".")):
            ending = os.path.splitext(name)[1].lower()
            if ending in image_endings():
                yield name if inside == "." else os.path.join(inside, name)
            else:
                passed[ending] += 1
    if passed:
        log.warning("%s: %s", root, passed_over(passed))


class IdxPair:
    """MNIST-style idx files, plain or gzipped, held in memory: `train-*` for split train, `t10k-*` for val and test.

    UserError where files are missing, damaged, or do not belong together.
    """

    def __init__(self, directory: str | Path, split: str = "train", classes: tuple[str, ...] = ()):
        prefix = "train" if split == "train" else "t10k"
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
    path = next((p for p in (directory / stem, directory / f"{stem}.gz") if p.is_file()), None)
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


Source = ImageFolder | TarShards | ParquetImages | IdxPair


def open_source(source: DataConfig | str | Path, split: str = "train") -> Source:
    """Open a data set by catalog name, directory, .tar shard, .parquet file, a glob of either, or an address of shards.

    A directory holds images at any depth, with or without class folders; *.tar shards; *.parquet files, in it or in its
    data/; or MNIST-style idx files. One with train/ beside val/ or test/ (ImageNet's layout) is split by them, Parquet
    files by the split that their names begin with; any other is all train. An address, https:// or s3://, is that of a
    directory that `fastjepa data shard` wrote, or of tars by braces, shard-{000000..000009}.tar.

    Args:
        source: the data set, or the section of a config that names it.
        split: "train", "val" or "test"; val and test stand in for each other.

    UserError, naming the path and the remedy, when there is nothing to read; ConfigError when the section names nothing.
    """
    where = _where(source)
    if is_remote(where):
        return _open_remote(where, split)
    if where in DATASETS:
        return _open_directory(find_dataset(where), split, DATASETS[where].classes)
    if os.path.isdir(where):
        try:
            return _open_directory(Path(where), split)
        except PermissionError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}); let it be read and entered") from error
    if where.endswith((".tar", ".parquet")) or glob.has_magic(where):
        return _open_files(sorted(glob.glob(where, recursive=True)) if glob.has_magic(where) else [where], where, split)
    raise UserError(f"data source {where!r} is neither a directory nor a data set's name; {closest_dataset(where)}")


def _where(source: DataConfig | str | Path) -> str:
    """Return the name, path or address of a data set, ~ expanded; the official keys of a config are joined to one path."""
    if isinstance(source, DataConfig):
        source = source.source or os.path.join(source.root_path or "", source.image_folder or "")
        if not source:
            raise ConfigError(f"data.source is not set; give a directory, or one of: {', '.join(DATASETS)}")
    return os.path.expanduser(source)


def _open_remote(where: str, split: str) -> RemoteShards:
    if where.endswith(".tar"):
        return open_tars(only_train(where, where, split))
    return open_directory(where, stand_in_splits(split, ("train", "val", "test")))


def _open_files(paths: list[str], where: str, split: str) -> Source:
    parquet = [path for path in paths if path.endswith(".parquet")]
    if parquet:
        return ParquetImages(only_train(parquet, where, split), where)
    shards = only_train([path for path in paths if path.endswith(".tar")], where, split)
    # Shards of several folders may have other classes in each; without names, labels keep their numbers.
    manifests = [read_manifest(folder) for folder in {Path(shard).parent for shard in shards}]
    return TarShards(shards, where, manifests[0]["classes"] if len(manifests) == 1 and manifests[0] else ())


def _open_directory(root: Path, split: str, classes: tuple[str, ...] = ()) -> Source:
    if any(root.glob("*-images-idx3-ubyte*")):
        return IdxPair(root, split, classes)
    tables = [sorted(filter(Path.is_file, root.glob(pattern))) for pattern in ("*.parquet", "data/*.parquet")]
    tables = tables[0] or tables[1]
    if tables:
        return ParquetImages(parquet_split(tables, root, split), root)
    if tables := nested_tables(root, split):
        return ParquetImages(tables, root)
    folder = split_folder(root, split)
    # A directory of shards that are still being written has a plan, and perhaps no shard yet: `open_shards` says so.
    return open_shards(folder) if (folder / SHARDS_PLAN).exists() or tars_in(folder) else ImageFolder(folder)
