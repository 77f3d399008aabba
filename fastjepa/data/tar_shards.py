"""WebDataset shards, read at random through an index: the one that `fastjepa data shard` writes beside each, or a scan."""

import contextlib
import hashlib
import json
import logging
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastjepa.data.endings import ARRAY_ENDINGS, files_with, image_endings, passed_over
from fastjepa.data.tar_members import TarMembers
from fastjepa.errors import UserError

SHARDS_MANIFEST = "manifest.json"  # in a directory of shards when all of them are there
SHARDS_PLAN = "unfinished-shards.json"  # in it before that
MANIFEST_FORMAT = "fastjepa shards 1"
INDEX_ARRAYS = "members", "offsets", "sizes", "labels"
NO_LABEL, ODD_LABEL = -1, -2  # without .cls, and with one that holds no number
STALE_INDEX = OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile  # what `stored_index` raises


MemberKey = tuple[str, str]  # folder, and name without its last ending


@dataclass(frozen=True)
class ShardIndex:
    """The places of the n images of one tar shard, and their labels."""

    members: np.ndarray  # (n,) bytes, names inside the tar
    offsets: np.ndarray  # (n,) int64, of the first byte
    sizes: np.ndarray  # (n,) int64, bytes
    labels: np.ndarray  # (n,) int64; NO_LABEL, ODD_LABEL
    faults: np.ndarray = field(default_factory=lambda: np.empty((0, 2), "U1"))  # (k, 2) str: `TarFault`, of a scanned tar


def index_path(shard: str | Path) -> Path:
    """Return the path of a shard's index: 000001.npz beside 000001.tar."""
    return Path(shard).with_suffix(".npz")


def tars_in(folder: Path) -> list[Path]:
    """Return the tars of a folder in the order of their names; hidden ones are being written, or are no shards at all."""
    return files_with(".tar", folder)


def tar_fingerprint(shard: str | Path) -> str:
    """Return the size of a tar and the SHA-256 of its last 64 KiB, which tell another tar without reading all of it."""
    with open(shard, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        return fingerprint_in(size, lambda start, length: os.pread(file.fileno(), length, start))


def fingerprint_in(size: int, read: Callable[[int, int], bytes]) -> str:
    """Return the fingerprint of a tar of `size` bytes wherever it lies; read(offset, length) gives its bytes."""
    length = min(size, 1 << 16)
    return f"{size}-{hashlib.sha256(read(size - length, length)).hexdigest()}"


def stored_index(shard: str | Path) -> dict[str, np.ndarray]:
    """Return the arrays of a tar's index file: those of `ShardIndex`, `fingerprint`, and `entry`, its manifest entry in JSON.

    One of STALE_INDEX where the file is missing, damaged, or not that tar's.
    """
    return arrays_of(index_path(shard), tar_fingerprint(shard))


def arrays_of(index: Path | BinaryIO, expected: str | None) -> dict[str, np.ndarray]:
    """Return the arrays of an index file; one of STALE_INDEX when it is damaged, or of a tar with another fingerprint."""
    with np.load(index, allow_pickle=False) as arrays:
        stored = dict(arrays)
    if expected and stored["fingerprint"].item() != expected:
        raise ValueError("of another tar")
    return stored


def index_in(stored: dict[str, np.ndarray]) -> ShardIndex:
    """Return the index among the arrays of an index file; KeyError where there is none."""
    scanned = {"faults": stored["faults"]} if "faults" in stored else {}
    return ShardIndex(*(stored[name] for name in INDEX_ARRAYS), **scanned)


def index_of(shard: str | Path) -> ShardIndex:
    """Return the stored index of a tar, else one made by a scan: with a warning where the stored one is not that tar's."""
    path = index_path(shard)
    if path.is_file():
        try:
            return index_in(stored_index(shard))
        except STALE_INDEX as error:
            said = "%s: not the index of the tar beside it (%s); delete it: each time the tar is scanned"
            logging.getLogger(__name__).warning(said, path, error)
    return scan_tar(shard)


class TarShards:
    """WebDataset shards: samples in the order of the shards, read at random through an index of member offsets.

    As WebDataset has it, a sample's key is its path up to the first dot of the file name, and the rest is the field's name:
    `a/001.jpg` and `a/001.cls` are one sample, of which `a/001.mask.png` is no image more. Where no image of a key has one
    dot alone, each is a sample: `img.v2.0001.jpg` and `img.v2.0002.jpg`. Labels are read from .cls when every sample has
    one; `classes` names them.
    """

    def __init__(
        self, shards: Sequence[str], where: str, classes: Sequence[str] = (), indexes: Sequence[ShardIndex] | None = None
    ):
        """Open shards, by `indexes` or, without, by the file beside each (`index_path`) or a scan of each tar's headers.

        UserError, which names `where`, for shards without images.
        """
        self._shards = list(shards)
        indexes = [index_of(shard) for shard in shards] if indexes is None else indexes
        counts = [len(index.members) for index in indexes]
        self.unreadable = _faults_in(self._shards, indexes)
        if not sum(counts):
            lost = ", but {}: {}; get it again, or".format(*self.unreadable[0]) if self.unreadable else ";"
            raise UserError(f"{where}: no images in its {len(shards)} tar shards{lost} give .tar files that hold images")
        members, offsets, sizes, labels = (np.concatenate([getattr(i, name) for i in indexes]) for name in INDEX_ARRAYS)
        self._members = members
        # (n, 3): shard, offset, bytes. Shards of 2 and 1 images give the first column 0, 0, 1.
        self._places = np.array([np.repeat(np.arange(len(counts)), counts), offsets, sizes]).T
        _warn_of_labels(labels, where)
        self._labels, self.classes = labels_and_classes(labels, classes, where)

    def __len__(self) -> int:
        return len(self._members)

    def name(self, i: int) -> str:
        """Return the path of image i's tar and its name in there."""
        return f"{self._shards[self._places[i, 0]]}/{os.fsdecode(self._members[i])}"

    def read(self, i: int) -> bytes:
        """Return the bytes of image i's file; OSError where its tar cannot be read."""
        number, offset, size = self._places[i].tolist()
        with open(self._shards[number], "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def label(self, i: int) -> int | None:
        """Return the number of image i's class; None without labels."""
        return None if self._labels is None else int(self._labels[i])


def _faults_in(shards: Sequence[str], indexes: Sequence[ShardIndex]) -> list[tuple[str, str]]:
    """Return (path, reason) of all that was found damaged or passed over in shards, and log how much in each."""
    found = []
    for shard, index in zip(shards, indexes, strict=True):
        faults = [(f"{shard}/{member}" if member else shard, reason) for member, reason in index.faults.tolist()]
        if faults:
            said = "%s: %d of its parts damaged or passed over, for example %s (%s); see `fastjepa data check`"
            logging.getLogger(__name__).warning(said, shard, len(faults), *faults[0])
        found += faults
    return found


def _warn_of_labels(labels: np.ndarray, where: str) -> None:
    """Log why labels are not used: [4, -1, -2] are a label, an image without .cls, and one with a .cls that holds no number."""
    odd, without = int((labels == ODD_LABEL).sum()), int((labels == NO_LABEL).sum())
    if odd or 0 < without < len(labels):
        said = "%s: labels are not used, as of %d images %d have no .cls and %d one that holds no number; training needs none"
        logging.getLogger(__name__).warning(said, where, len(labels), without, odd)


def scan_tar(shard: str | Path, file: BinaryIO | None = None) -> ShardIndex:
    """Return the index of a tar from its headers, read from `file` where it is not on a disk.

    UserError for what is no tar, and for a file that cannot be read.
    """
    try:
        with contextlib.nullcontext(file) if file else open(shard, "rb") as opened:
            members = TarMembers(opened)
            images, labels, others = _sorted_members(members, opened)
    except UserError:  # of a remote file, which has said it
        raise
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror or error}); mend that, or leave it out") from error
    except ValueError as error:
        mend = "unpack it to a plain .tar" if "compressed" in str(error) else "make it again, uncompressed"
        raise UserError(f"{shard}: not a tar shard that can be read ({error}); {mend}") from error
    images = _one_a_sample(images, others)
    if others:
        logging.getLogger(__name__).warning("%s: %s", shard, passed_over(others))
    # One row an image, without a row (0, 3): offset, bytes, label. a.input.jpg has the label in a.input.cls, else in a.cls.
    numbers = [(m.offset_data, m.size, labels.get(key, labels.get(_sample_of(key), NO_LABEL))) for key, m in images]
    offsets, sizes, label = np.array(numbers, dtype=np.int64).reshape(-1, 3).T
    names = np.array([os.fsencode(member.name) for _, member in images], dtype="S")
    return ShardIndex(names, offsets, sizes, label, np.array(members.faults, dtype="U").reshape(-1, 2))


def _sorted_members(
    members: TarMembers, file: BinaryIO
) -> tuple[list[tuple[MemberKey, tarfile.TarInfo]], dict[MemberKey, int], Counter]:
    """Return a tar's images, its labels, and how many files of each other ending belong to no image; hidden files are none.

    Where no other image is in it, .npy and .npz files are the images.
    """
    images, labels, others, arrays = [], {}, [], []
    for member in members:
        folder, _, name = member.name.rpartition("/")
        stem, ending = os.path.splitext(name)
        if name.startswith("."):
            continue
        if ending == ".cls":
            labels[folder, stem] = _label_in(file, member)
        elif ending.lower() in image_endings():
            images.append(((folder, stem), member))
        elif ending.lower() in ARRAY_ENDINGS:
            arrays.append(((folder, stem), member))
        else:
            others.append(((folder, stem), ending.lower()))
    if images:
        others += [(key, os.path.splitext(member.name)[1].lower()) for key, member in arrays]
    images = images or arrays
    samples = {_sample_of(key) for key, _ in images}
    return images, labels, Counter(ending for key, ending in others if _sample_of(key) not in samples)


def _label_in(file: BinaryIO, member: tarfile.TarInfo) -> int:
    """Return the label in a .cls member; ODD_LABEL where it holds no number, or one that no class can have."""
    file.seek(member.offset_data)
    number = re.fullmatch(rb"\s*(-?)(\d{1,6})\s*", file.read(min(member.size, 16)))
    return ODD_LABEL if number is None else NO_LABEL if number[1] else int(number[2])


def _one_a_sample(images: list[tuple[MemberKey, tarfile.TarInfo]], others: Counter) -> list[tuple[MemberKey, tarfile.TarInfo]]:
    """Return the images without further fields of a sample, a.mask.png beside a.jpg, which `others` counts by their endings."""
    whole = {key for key, _ in images if _sample_of(key) == key}
    for key, member in images:
        if key not in whole and _sample_of(key) in whole:
            others[f".{os.path.basename(member.name).partition('.')[2]}".lower()] += 1
    return [(key, member) for key, member in images if key in whole or _sample_of(key) not in whole]


def _sample_of(key: MemberKey) -> MemberKey:
    """Return the sample of a member, its path up to the first dot of its name: ("a", "1.mask") is of ("a", "1")."""
    return key[0], key[1].partition(".")[0]


def labels_and_classes(labels: np.ndarray, names: Sequence[str], where) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Return labels and the names of their classes, numbers where no names are given.

    None and () when any label is negative: that image has none. UserError, which names `where`, for a label without a name.
    """
    if labels.min() < 0:
        return None, ()
    names = tuple(names) or tuple(map(str, range(labels.max() + 1)))
    if labels.max() >= len(names):
        raise UserError(f"{where}: label {labels.max()} has no name among its {len(names)} classes; make it again")
    return labels, names


def read_manifest(folder: Path) -> dict | None:
    """Return the manifest that `fastjepa data shard` wrote into a directory; None where another tool made the shards.

    UserError for shards that are not complete yet and for a manifest that cannot be read.
    """
    if (folder / SHARDS_PLAN).exists():
        raise UserError(f"{folder}: its shards are not complete; run again the `fastjepa data shard` command that makes them")
    if not (folder / SHARDS_MANIFEST).is_file():
        return None
    return parse_manifest((folder / SHARDS_MANIFEST).read_bytes(), folder / SHARDS_MANIFEST)


def parse_manifest(raw: bytes, where: str | Path) -> dict | None:
    """Return the manifest in a file's bytes; None where another tool wrote it, UserError where it is damaged."""
    try:
        manifest = json.loads(raw)
        if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
            return None
        listed = [tuple(entry[key] for key in ("file", "images", "bytes", "sha256")) for entry in manifest["shards"]]
        if sum(images for _, images, _, _ in listed) != manifest["images"] or not isinstance(manifest["classes"], list):
            raise ValueError("its counts disagree")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: damaged ({error}); get it again, or delete it to go without") from error
    return manifest


def open_shards(folder: Path) -> TarShards:
    """Open the shards of a directory; UserError where it has a manifest that lists other files, or other sizes."""
    shards, manifest = list(map(str, tars_in(folder))), read_manifest(folder)
    if manifest is None:
        return TarShards(shards, str(folder))
    found = {os.path.basename(shard): os.path.getsize(shard) for shard in shards}
    listed = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    for name in sorted(found.keys() | listed.keys()):
        if found.get(name) != listed.get(name):
            sizes = [f"{size} bytes" if size is not None else "no such file" for size in (found.get(name), listed.get(name))]
            raise UserError(
                f"{folder / name}: {sizes[0]}, but in {SHARDS_MANIFEST} {sizes[1]}; run: fastjepa data check {folder}"
            )
    return TarShards(shards, str(folder), manifest["classes"])
