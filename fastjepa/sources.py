"""Where images lie: a folder, tar shards, Parquet files, idx files. Sources know files and labels, and nothing of order.

A source is a numbered set of images: `len(source)`; `read(i)`, an encoded file or (H, W) or (H, W, 3) uint8; `name(i)`,
where it lies; `label(i)`, an int or None; `classes`, the labels' names, () without labels.
"""

import errno
import glob
import gzip
import json
import logging
import math
import os
import re
import stat
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from fastjepa import catalog, remote_shards
from fastjepa.config import ConfigError, DataConfig
from fastjepa.remote import is_remote
from fastjepa.remote_shards import RemoteShards
from fastjepa.shards import ENDINGS, PLAN, TarShards, labels_and_classes, open_shards, read_manifest

log = logging.getLogger(__name__)

PARQUET_SPLIT = re.compile(r"(train|val|test)(?:idation)?(?![a-z])")
FORMATS = "image files at any depth, *.tar shards, *.parquet files with an image column, or MNIST-style idx files"


class ImageFolder:
    """Image files at any depth below `root`, in sorted order; hidden files and links to a folder above are passed over.

    Labels are the first-level folders when every image lies in one.
    """

    def __init__(self, root: str | Path):
        self.root = str(root)
        paths = sorted(_image_files(self.root))
        if not paths:
            raise ConfigError(f"{root}: no image files in it; give a directory that holds {FORMATS}")
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
        with open(self.name(i), "rb", buffering=0, opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "a pipe or a device, not a file", self.name(i))
            return file.read()

    def label(self, i: int) -> int | None:
        return None if self._labels is None else int(self._labels[i])


def _without_waiting(path: str, flags: int) -> int:
    """Opens a named pipe too at once, where `open` would wait for whoever writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _image_files(root: str) -> Iterator[str]:
    def identity(folder: str) -> tuple[int, int]:
        status = os.stat(folder)
        return status.st_dev, status.st_ino

    def unreadable(error: OSError) -> None:
        log.warning("%s: passed over (%s)", error.filename, error.strerror)

    above = {root: frozenset([identity(root)])}  # of each folder still to come: itself and those it lies in
    for folder, folders, files in os.walk(root, followlinks=True, onerror=unreadable):
        chain, inside = above.pop(folder), os.path.relpath(folder, root)
        found = {os.path.join(folder, name): name for name in folders if not name.startswith(".")}
        fresh = {path: chain | {own} for path in found if (own := identity(path)) not in chain}
        for path in found.keys() - fresh.keys():
            log.warning("%s: passed over, a link to a folder it lies in", path)
        above |= fresh
        folders[:] = [found[path] for path in fresh]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in ENDINGS:
                yield name if inside == "." else os.path.join(inside, name)


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


class ParquetImages:
    """Rows of Parquet files that hold encoded images, as Hugging Face writes them.

    The images are the column `image` or `img`, or the only one of bytes or of a struct with the field `bytes`. Labels are
    the integers of a column `label` or `labels`, their names those of the Hugging Face schema. A read unpacks a row group,
    often 100 images, of which each process keeps its last: in random order that is slow, and `fastjepa data shard` helps.
    """

    def __init__(self, files: Sequence[str | Path], where: str | Path):
        self._files, self._opened, self._last = list(map(str, files)), {}, (-1, None)
        schema = self._file(0).schema_arrow
        self._column, label = _image_column(schema, where), _label_column(schema)
        groups, labels = [], []
        for number, name in enumerate(self._files):
            opened = self._file(number)
            columns = [self._column, *label]
            if any(
                c not in opened.schema_arrow.names or opened.schema_arrow.field(c).type != schema.field(c).type for c in columns
            ):
                raise ConfigError(
                    f"{name}: other columns than {self._files[0]}; put the files of each data set into a folder of its own"
                )
            groups += [(number, g, opened.metadata.row_group(g).num_rows) for g in range(opened.num_row_groups)]
            labels += [opened.read(label)[c].fill_null(-1).to_numpy() for c in label]
        self._groups = np.array(groups, dtype=np.int64).reshape(-1, 3)  # (groups, 3): file, row group, rows
        self._ends = self._groups[:, 2].cumsum()
        if not len(self):
            raise ConfigError(f"{where}: no rows in its {len(files)} Parquet files; give files that hold images")
        self._labels, self.classes = None, ()
        if label:
            self._labels, self.classes = labels_and_classes(np.concatenate(labels), _hf_names(schema, *label), where)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": {}, "_last": (-1, None)}  # open files stay in their process

    def _file(self, number: int):
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise ConfigError("Parquet files need pyarrow; run: pip install 'fastjepa[pyarrow]'") from error
        if number not in self._opened:
            try:
                self._opened[number] = parquet.ParquetFile(self._files[number], memory_map=True)
            except ArrowException as error:
                raise ConfigError(f"{self._files[number]}: not a whole Parquet file ({error}); get it again") from error
        return self._opened[number]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _place(self, i: int) -> tuple[int, int]:
        """(row group among all, row in it)."""
        group = int(np.searchsorted(self._ends, i, side="right"))
        return group, i - int(self._ends[group] - self._groups[group, 2])

    def name(self, i: int) -> str:
        number = self._groups[self._place(i)[0], 0]
        before = self._groups[self._groups[:, 0] < number, 2].sum()
        return f"{self._files[number]}[{i - before}]"

    def read(self, i: int) -> bytes:
        group, row = self._place(i)
        if self._last[0] != group:
            self._last = group, self._read_group(*self._groups[group, :2].tolist())
        value = self._last[1][row].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if value is None:
            raise OSError(f"{self.name(i)}: a row without bytes")
        return value

    def _read_group(self, number: int, group: int):
        from pyarrow import ArrowException

        try:
            return self._file(number).read_row_group(group, columns=[self._column], use_threads=False)[self._column]
        except FileNotFoundError:
            raise
        except (ArrowException, OSError, ConfigError) as error:
            raise OSError(f"{self._files[number]}: row group {group} cannot be read ({error})") from error

    def label(self, i: int) -> int | None:
        return None if self._labels is None else int(self._labels[i])


def _image_column(schema, where: str | Path) -> str:
    from pyarrow import types

    def holds_bytes(kind) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    found = [field.name for field in schema if holds_bytes(field.type)]
    named = [name for name in ("image", "img") if name in found] or found
    if not named or len(named) > 1 and named is found:
        raise ConfigError(f"{where}: which of the columns {', '.join(schema.names)} holds the images? Name it `image`; "
                          "it must hold bytes, or a struct with the field `bytes`")  # fmt: skip
    return named[0]


def _label_column(schema) -> list[str]:
    from pyarrow import types

    return [n for n in ("label", "labels") if n in schema.names and types.is_integer(schema.field(n).type)][:1]


def _hf_names(schema, label: str) -> tuple[str, ...]:
    """Class names from the JSON that Hugging Face's `datasets` writes into the schema; () where there are none."""
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return tuple(stored.get("info", {}).get("features", {}).get(label, {}).get("names") or ())


Source = ImageFolder | TarShards | ParquetImages | IdxPair


def open_source(source: DataConfig | str | Path, split: str = "train") -> Source:
    """Open a data set by catalog name, directory, .tar shard, .parquet file, a glob of either, or an address of shards.

    A directory holds images at any depth, with or without class folders; *.tar shards; *.parquet files, in it or in its
    data/; or MNIST-style idx files. One with train/ beside val/ or test/ (ImageNet's layout) is split by them, Parquet
    files by the split that their names begin with; any other is all train. `split` is "train", "val" or "test"; val and
    test stand in for each other. An address, https:// or s3://, is that of a directory that `fastjepa data shard` wrote, or
    of tars by braces, shard-{000000..000009}.tar. ConfigError, naming the path and the remedy, when there is nothing to read.
    """
    where = _where(source)
    if is_remote(where):
        return _open_remote(where, split)
    if where in catalog.ENTRIES:
        return _open_directory(catalog.find(where), split, catalog.ENTRIES[where].classes)
    if os.path.isdir(where):
        return _open_directory(Path(where), split)
    if where.endswith((".tar", ".parquet")) or glob.has_magic(where):
        return _open_files(sorted(glob.glob(where, recursive=True)) if glob.has_magic(where) else [where], where, split)
    raise ConfigError(f"data source {where!r} is neither a directory nor a data set's name; {catalog.nearest(where)}")


def _where(source: DataConfig | str | Path) -> str:
    if isinstance(source, DataConfig):
        source = source.source or os.path.join(source.root_path or "", source.image_folder or "")
        if not source:
            raise ConfigError(f"data.source is not set; give a directory, or one of: {', '.join(catalog.ENTRIES)}")
    return os.path.expanduser(source)


def _open_remote(where: str, split: str) -> RemoteShards:
    if where.endswith(".tar"):
        return remote_shards.open_tars(_only_train(where, where, split))
    return remote_shards.open_directory(where, _stand_ins(split, ("train", "val", "test")))


def _open_files(paths: list[str], where: str, split: str) -> Source:
    parquet = [path for path in paths if path.endswith(".parquet")]
    if parquet:
        return ParquetImages(_only_train(parquet, where, split), where)
    shards = _only_train([path for path in paths if path.endswith(".tar")], where, split)
    manifests = [read_manifest(folder) for folder in {Path(shard).parent for shard in shards}]
    return TarShards(shards, where, manifests[0]["classes"] if len(manifests) == 1 and manifests[0] else ())


def _open_directory(root: Path, split: str, classes: tuple[str, ...] = ()) -> Source:
    if any(root.glob("*-images-idx3-ubyte*")):
        return IdxPair(root, split, classes)
    tables = sorted(root.glob("*.parquet")) or sorted(root.glob("data/*.parquet"))
    if tables:
        return ParquetImages(_parquet_split(tables, root, split), root)
    folder = split_folder(root, split)
    tables = sorted(folder.glob("*.parquet"))
    if tables:
        return ParquetImages(tables, folder)
    return open_shards(folder) if (folder / PLAN).exists() or any(folder.glob("*.tar")) else ImageFolder(folder)


def split_folder(root: Path, split: str) -> Path:
    """The directory below `root`, or `root` itself, that holds a split; ConfigError where there is no such split."""
    # `DirEntry.is_dir` raises for a link to itself.
    folders = {e.name for e in os.scandir(root) if (os.path.isdir(e.path) if e.is_symlink() else e.is_dir())}
    if "train" in folders and (folders & {"val", "test"} or folders == {"train"}):
        for name in _stand_ins(split, folders):
            return root / name
    return _only_train(root, root, split)


def _stand_ins(split: str, found: Collection[str]) -> list[str]:
    """Which of the splits found may serve as `split`, best first."""
    return [name for name in (["train"] if split == "train" else [split, *sorted({"val", "test"} - {split})]) if name in found]


def _parquet_split(tables: list[Path], root: Path, split: str) -> list[Path]:
    """Those of a split by the beginning of their names, as Hugging Face has it: train-00000-of-00002.parquet."""
    split_of = {path: match[1] for path in tables if (match := PARQUET_SPLIT.match(path.name))}
    if not split_of:
        return _only_train(tables, root, split)
    for name in _stand_ins(split, split_of.values()):
        return [path for path in tables if split_of.get(path) == name]
    raise ConfigError(f"{root}: has no {split} split; name its files {split}-*.parquet")


def _only_train(found, where: str | Path, split: str):
    if split != "train":
        raise ConfigError(f"{where}: has no {split} split; put its images into train/ and {split}/ folders")
    return found
