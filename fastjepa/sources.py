"""Where images lie: a folder, tar shards, a pair of idx files. Sources know files and labels, and nothing of order.

A source is a numbered set of images: `len(source)`; `read(i)`, an encoded file or (H, W) or (H, W, 3) uint8; `name(i)`,
where it lies; `label(i)`, an int or None; `classes`, the labels' names, () without labels.
"""

import glob
import gzip
import math
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fastjepa import catalog
from fastjepa.config import ConfigError, DataConfig

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}


class ImageFolder:
    """Image files at any depth below `root`, in sorted order; hidden files are passed over.

    Labels are the first-level folders when every image lies in one.
    """

    def __init__(self, root: str | Path):
        self.root = str(root)
        paths = sorted(_image_files(self.root))
        if not paths:
            raise ConfigError(f"{root}: no image files in it; give a directory that holds {' '.join(sorted(ENDINGS))} files")
        # One array: lists of a million strings would be copied into every worker as their reference counts change.
        self._paths = np.array([os.fsencode(path) for path in paths])
        labelled = all(os.sep in path for path in paths)
        folders = [path.split(os.sep, 1)[0] for path in paths] if labelled else []
        self.classes = tuple(sorted(set(folders)))
        self._labels = np.unique(folders, return_inverse=True)[1] if labelled else None

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._paths[i]))

    def read(self, i: int) -> bytes:
        with open(self.name(i), "rb", buffering=0) as file:
            return file.read()

    def label(self, i: int) -> int | None:
        return None if self._labels is None else int(self._labels[i])


def _image_files(root: str) -> Iterator[str]:
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(folder, root)
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in ENDINGS:
                yield name if inside == "." else os.path.join(inside, name)


class TarShards:
    """WebDataset shards: samples in the order of the shards, read at random through an index of member offsets.

    As WebDataset has it, a sample's key is its path up to the first dot of the file name and the rest is the field's
    name: `a/001.jpg` and `a/001.cls` are one sample. Labels are read from .cls when every sample has one.
    """

    def __init__(self, shards: Sequence[str], where: str):
        self._shards = list(shards)
        found = [(number, *sample) for number, shard in enumerate(shards) for sample in _index_shard(shard)]
        if not found:
            raise ConfigError(f"{where}: no images in its {len(shards)} tar shards; give .tar files that hold images")
        number, member, offset, size, label = zip(*found, strict=True)
        self._members = np.array([os.fsencode(name) for name in member])
        self._places = np.array([number, offset, size]).T  # (n, 3): shard, byte offset, bytes
        self._labels = np.array(label) if None not in label else None
        self.classes = () if self._labels is None else tuple(map(str, range(self._labels.max() + 1)))

    def __len__(self) -> int:
        return len(self._members)

    def name(self, i: int) -> str:
        return f"{self._shards[self._places[i, 0]]}/{os.fsdecode(self._members[i])}"

    def read(self, i: int) -> bytes:
        number, offset, size = self._places[i].tolist()
        with open(self._shards[number], "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def label(self, i: int) -> int | None:
        return None if self._labels is None else int(self._labels[i])


def _index_shard(shard: str) -> list[tuple[str, int, int, int | None]]:
    """(member, offset, size, label) of every image in a tar file; ConfigError for one that is damaged."""
    images, labels = [], {}
    try:
        with tarfile.open(shard, "r:") as opened:
            for member in opened:
                folder, _, name = member.name.rpartition("/")
                stem, _, field = name.partition(".")
                if member.isfile() and f".{field.lower()}" in ENDINGS and stem:
                    images.append(((folder, stem), member))
                elif member.isfile() and field == "cls":
                    labels[folder, stem] = int(opened.extractfile(member).read())
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ConfigError(f"{shard}: not a tar shard that can be read ({error}); make it again, uncompressed") from error
    return [(member.name, member.offset_data, member.size, labels.get(key)) for key, member in images]


class IdxPair:
    """MNIST-style idx files, plain or gzipped, held in memory: `train-*` for split train, `t10k-*` for val and test."""

    def __init__(self, directory: str | Path, split: str = "train", classes: tuple[str, ...] = ()):
        prefix = "train" if split == "train" else "t10k"
        self._images, self._file = _read_idx(Path(directory), f"{prefix}-images-idx3-ubyte", dims=3)
        self._labels, labels_file = _read_idx(Path(directory), f"{prefix}-labels-idx1-ubyte", dims=1)
        if len(self._labels) != len(self._images) or not len(self._images):
            raise ConfigError(f"{labels_file}: {len(self._labels)} labels for {len(self._images)} images; get both files again")
        self.classes = classes or tuple(map(str, range(int(self._labels.max()) + 1)))

    def __len__(self) -> int:
        return len(self._images)

    def name(self, i: int) -> str:
        return f"{self._file}[{i}]"

    def read(self, i: int) -> np.ndarray:
        return self._images[i]

    def label(self, i: int) -> int:
        return int(self._labels[i])


def _read_idx(directory: Path, stem: str, dims: int) -> tuple[np.ndarray, Path]:
    """The uint8 array of an idx file: bytes 0 0 8 dims, the shape as big-endian int32, the values."""
    path = next((p for p in (directory / stem, directory / f"{stem}.gz") if p.is_file()), None)
    if path is None:
        raise ConfigError(f"{directory / stem}.gz: no such file; put the four idx files of the data set into {directory}")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be unpacked ({error}); delete it and get it again") from error
    header = 4 + 4 * dims
    shape = np.frombuffer(raw[4:header], dtype=">i4").tolist()
    if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) != header + math.prod(shape):
        raise ConfigError(f"{path}: not an idx file of {dims} dimensions of bytes; delete it and get it again")
    return np.frombuffer(bytearray(raw), dtype=np.uint8, offset=header).reshape(shape), path


Source = ImageFolder | TarShards | IdxPair


def open_source(source: DataConfig | str | Path, split: str = "train") -> Source:
    """Open a data set by catalog name, directory, tar shard or glob of shards.

    A directory with train/ beside val/ or test/ is split by them; any other directory is all train. It may hold images
    at any depth, *.tar shards, or MNIST-style idx files. `split` is "train", "val" or "test"; val and test stand in for
    each other. ConfigError, naming the path and the remedy, when there is nothing to read.
    """
    where = os.path.expanduser(_configured(source) if isinstance(source, DataConfig) else source)
    if where in catalog.ENTRIES:
        return _open_directory(catalog.find(where), split, catalog.ENTRIES[where].classes)
    if where.endswith(".tar") or glob.has_magic(where):
        shards = sorted(path for path in glob.glob(where, recursive=True) if path.endswith(".tar"))
        return TarShards(_only_train(shards, where, split), where)
    if os.path.isdir(where):
        return _open_directory(Path(where), split)
    raise ConfigError(f"data source {where!r} is neither a directory nor a data set's name; {catalog.nearest(where)}")


def _configured(data: DataConfig) -> str:
    where = data.source or os.path.join(data.root_path or "", data.image_folder or "")
    if not where:
        raise ConfigError(f"data.source is not set; give a directory, or one of: {', '.join(catalog.ENTRIES)}")
    return where


def _open_directory(root: Path, split: str, classes: tuple[str, ...] = ()) -> Source:
    if any(root.glob("*-images-idx3-ubyte*")):
        return IdxPair(root, split, classes)
    folder = _split_folder(root, split)
    shards = sorted(map(str, folder.glob("*.tar")))
    return TarShards(shards, str(folder)) if shards else ImageFolder(folder)


def _split_folder(root: Path, split: str) -> Path:
    folders = {entry.name for entry in os.scandir(root) if entry.is_dir()}
    if "train" in folders and (folders & {"val", "test"} or folders == {"train"}):
        for name in ["train"] if split == "train" else [split, *sorted({"val", "test"} & folders)]:
            if name in folders:
                return root / name
    return _only_train(root, root, split)


def _only_train(found, where: str | Path, split: str):
    if split != "train":
        raise ConfigError(f"{where}: has no {split} split; put its images into train/ and {split}/ folders")
    return found
