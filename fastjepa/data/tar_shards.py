"""WebDataset shards, read at random through an index that `fastjepa data shard` writes beside each, or through a scan."""

import hashlib
import json
import logging
import os
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastjepa.errors import ConfigError

log = logging.getLogger(__name__)

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}
SHARDS_MANIFEST, SHARDS_PLAN = (
    "manifest.json",
    "unfinished-shards.json",
)  # in a directory of shards: when all are there, and before
MANIFEST_FORMAT = "fastjepa shards 1"
STALE_INDEX = OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile  # what `stored_index` raises


@dataclass(frozen=True)
class ShardIndex:
    """Where the n images of one tar shard lie in it."""

    members: np.ndarray  # (n,) bytes, names inside the tar
    offsets: np.ndarray  # (n,) int64, of the first byte
    sizes: np.ndarray  # (n,) int64, bytes
    labels: np.ndarray  # (n,) int64, -1 without a label


def index_path(shard: str | Path) -> Path:
    """The file that holds a shard's index."""
    return Path(shard).with_suffix(".npz")


def tar_fingerprint(shard: str | Path) -> str:
    """The size of a tar and the SHA-256 of its last 64 KiB: what tells another tar without reading all of it."""
    with open(shard, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        return fingerprint_in(size, lambda start, length: os.pread(file.fileno(), length, start))


def fingerprint_in(size: int, read: Callable[[int, int], bytes]) -> str:
    """`fingerprint` of a tar of `size` bytes wherever it lies; read(offset, length) gives its bytes."""
    length = min(size, 1 << 16)
    return f"{size}-{hashlib.sha256(read(size - length, length)).hexdigest()}"


def stored_index(shard: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a tar's index file: those of `Index`, `fingerprint` and `entry`; one of STALE when not that tar's."""
    return arrays_of(index_path(shard), tar_fingerprint(shard))


def arrays_of(index: Path | BinaryIO, expected: str | None) -> dict[str, np.ndarray]:
    """The arrays of an index file; one of STALE when it is damaged, or not that of the tar with the expected fingerprint."""
    with np.load(index, allow_pickle=False) as arrays:
        stored = dict(arrays)
    if expected and stored["fingerprint"].item() != expected:
        raise ValueError("of another tar")
    return stored


def index_in(stored: dict[str, np.ndarray]) -> ShardIndex:
    """The index among the arrays of an index file; KeyError where there is none."""
    return ShardIndex(*(stored[field.name] for field in fields(ShardIndex)))


def index_of(shard: str | Path) -> ShardIndex:
    """The stored index of a tar, else one made by a scan: with a warning where there is one that is not that tar's."""
    path = index_path(shard)
    if path.is_file():
        try:
            return index_in(stored_index(shard))
        except STALE_INDEX as error:
            log.warning("%s: not the index of the tar beside it (%s); delete it: each time the tar is scanned", path, error)
    return scan_tar(shard)


class TarShards:
    """WebDataset shards: samples in the order of the shards, read at random through an index of member offsets.

    The index is read from the file beside the tar (`index_path`), else made by a scan of the tar's headers. As WebDataset
    has it, a sample's key is its path up to the first dot of the file name and the rest is the field's name: `a/001.jpg`
    and `a/001.cls` are one sample. Labels are read from .cls when every sample has one; `classes` names them.
    """

    def __init__(
        self, shards: Sequence[str], where: str, classes: Sequence[str] = (), indexes: Sequence[ShardIndex] | None = None
    ):
        self._shards = list(shards)
        indexes = [index_of(shard) for shard in shards] if indexes is None else indexes
        counts = [len(index.members) for index in indexes]
        if not sum(counts):
            raise ConfigError(f"{where}: no images in its {len(shards)} tar shards; give .tar files that hold images")
        members, offsets, sizes, labels = (
            np.concatenate([getattr(i, field.name) for i in indexes]) for field in fields(ShardIndex)
        )
        self._members = members
        self._places = np.array([np.repeat(np.arange(len(counts)), counts), offsets, sizes]).T  # (n, 3): shard, offset, bytes
        self._labels, self.classes = labels_and_classes(labels, classes, where)

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


def scan_tar(shard: str | Path, file: BinaryIO | None = None) -> ShardIndex:
    """The index of a tar, read from `file` where it is not on a disk, from its headers; ConfigError for a damaged one."""
    images, labels = [], {}
    try:
        with tarfile.open(shard, "r:", fileobj=file) as opened:
            for member in opened:
                folder, _, name = member.name.rpartition("/")
                stem, _, field = name.partition(".")
                if member.isfile() and f".{field.lower()}" in ENDINGS and stem:
                    images.append(((folder, stem), member))
                elif member.isfile() and field == "cls":
                    labels[folder, stem] = int(opened.extractfile(member).read())
    except ConfigError:  # of a remote file, which has said it
        raise
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ConfigError(f"{shard}: not a tar shard that can be read ({error}); make it again, uncompressed") from error
    numbers = [(member.offset_data, member.size, labels.get(key, -1)) for key, member in images]
    offsets, sizes, label = np.array(numbers, dtype=np.int64).reshape(-1, 3).T
    return ShardIndex(np.array([os.fsencode(member.name) for _, member in images], dtype="S"), offsets, sizes, label)


def labels_and_classes(labels: np.ndarray, names: Sequence[str], where) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels and the names of their classes, numbers where none are given; None and () when any label is negative."""
    if labels.min() < 0:
        return None, ()
    names = tuple(names) or tuple(map(str, range(labels.max() + 1)))
    if labels.max() >= len(names):
        raise ConfigError(f"{where}: label {labels.max()} has no name among its {len(names)} classes; make it again")
    return labels, names


def read_manifest(folder: Path) -> dict | None:
    """The manifest that `fastjepa data shard` wrote into a directory; None where another tool made the shards.

    ConfigError for shards that are not complete yet and for a manifest that cannot be read.
    """
    if (folder / SHARDS_PLAN).exists():
        raise ConfigError(f"{folder}: its shards are not complete; run again the `fastjepa data shard` command that makes them")
    if not (folder / SHARDS_MANIFEST).is_file():
        return None
    return parse_manifest((folder / SHARDS_MANIFEST).read_bytes(), folder / SHARDS_MANIFEST)


def parse_manifest(raw: bytes, where: str | Path) -> dict | None:
    """The manifest in a file's bytes; None and ConfigError as `read_manifest`."""
    try:
        manifest = json.loads(raw)
        if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
            return None
        listed = [tuple(entry[key] for key in ("file", "images", "bytes", "sha256")) for entry in manifest["shards"]]
        if sum(images for _, images, _, _ in listed) != manifest["images"] or not isinstance(manifest["classes"], list):
            raise ValueError("its counts disagree")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: damaged ({error}); get it again, or delete it to go without") from error
    return manifest


def open_shards(folder: Path) -> TarShards:
    """The shards of a directory, which must be those its manifest lists, where it has one."""
    shards, manifest = sorted(map(str, folder.glob("*.tar"))), read_manifest(folder)
    if manifest is None:
        return TarShards(shards, str(folder))
    found = {os.path.basename(shard): os.path.getsize(shard) for shard in shards}
    listed = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    for name in sorted(found.keys() | listed.keys()):
        if found.get(name) != listed.get(name):
            sizes = [f"{size} bytes" if size is not None else "no such file" for size in (found.get(name), listed.get(name))]
            raise ConfigError(
                f"{folder / name}: {sizes[0]}, but in {SHARDS_MANIFEST} {sizes[1]}; run: fastjepa data check {folder}"
            )
    return TarShards(shards, str(folder), manifest["classes"])
