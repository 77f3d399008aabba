"""The kind of files, of those that lie in one place, that is the data set: the others must be few, and are named."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastjepa.data.endings import files_with, image_endings, passed_over
from fastjepa.data.idx_files import IdxPair, idx_files
from fastjepa.data.image_folder import ImageFolder, image_files
from fastjepa.data.parquet import ParquetImages, may_hold_images
from fastjepa.data.splits import SPLIT_NAMES, folders_in
from fastjepa.data.tar_shards import SHARDS_MANIFEST, TarShards, index_of, index_path, read_manifest
from fastjepa.errors import UserError

log = logging.getLogger(__name__)

STRAY_SHARE = 5  # images of another kind are strays below one in so many; from there on they are half of the data set

Source = ImageFolder | TarShards | ParquetImages | IdxPair


class Kind(NamedTuple):
    """The images of one kind of files in a place."""

    count: int
    words: str  # "4 images in 1 tar shards (stray.tar)"
    source: Source | None  # None of image files, which are opened when they are chosen


def image_tables(tables: Sequence[Path]) -> list[Path]:
    """Return the Parquet files that may hold images; the others are tables of metadata."""
    return [table for table in tables if may_hold_images(table)]


def shards_among(tars: list[Path], where: str | Path, images: int) -> TarShards | None:
    """Open the tars that hold images; None where none does.

    UserError for what is no tar, unless no tar can be read and `images` image files lie beside: a stray, then, that is told.
    """
    indexes, refused = {}, []
    for tar in tars:
        try:
            indexes[tar] = index_of(tar)
        except UserError as error:
            refused.append(error)
    if refused and (indexes or not images):
        raise refused[0]
    for error in refused:
        log.warning("%s: passed over, beside %d image files", error, images)
    if images and not any(len(index.members) for index in indexes.values()):
        return None
    # Shards of several folders may have other classes in each; without names, labels keep their numbers.
    manifests = [read_manifest(folder) for folder in {tar.parent for tar in tars}]
    classes = manifests[0]["classes"] if len(manifests) == 1 and manifests[0] else ()
    return TarShards(list(map(str, indexes)), str(where), classes, list(indexes.values())) if indexes else None


def still_packed(tars: list[Path], folder: Path) -> list[Path]:
    """Return the tars that no folder of images beside them is named after; the others were unpacked, which is told."""
    beside = set(folders_in(folder))
    unpacked = [tar for tar in tars if tar.stem in beside and image_files(str(tar.with_suffix("")), [], Counter())]
    if unpacked:
        said = "%s: %d tars passed over, as folders of images beside them have their names (%s); the folders are used"
        log.warning(said, folder, len(unpacked), unpacked[0].name)
    return [tar for tar in tars if tar not in set(unpacked)]


def count_images(folder: Path) -> int:
    """Return how many image files lie below a folder."""
    return len(image_files(str(folder), [], Counter()))


def kind_of(source: Source, files: Sequence[Path]) -> Kind:
    """Return a source as the images of one kind, with the files that it was opened from."""
    kind = {TarShards: "tar shards", ParquetImages: "Parquet files", IdxPair: "idx files"}[type(source)]
    named = f"{len(files)} {kind} ({files[0].name})" if files else kind
    return Kind(len(source), f"{len(source)} images in {named}", source)


def choose_kind(kinds: list[Kind], where: str | Path) -> Source | None:
    """Return the source that is the data set, None for image files: the largest, where all others are strays.

    Strays are told with the counts. UserError, with the counts, for a mixture: 30 image files and 10 images in a tar.
    """
    best = max(kinds, key=lambda kind: kind.count)
    rest, total = sum(kind.count for kind in kinds) - best.count, sum(kind.count for kind in kinds)
    if rest:
        both = " and ".join(kind.words for kind in sorted(kinds, key=lambda kind: -kind.count) if kind.count)
        if rest * STRAY_SHARE >= total:
            raise UserError(f"{where}: {both} lie in it; move one kind elsewhere, or name the files of one: {where}/*.tar")
        log.warning("%s: %s lie in it; the first are used, the others passed over", where, both)
    return best.source


def tell_beside(root: Path) -> None:
    """Log which folders, and how many images and tars, lie in no split beside the folders of splits."""
    folders = [f"{name}/" for name in sorted(folders_in(root)) if name.lower() not in SPLIT_NAMES]
    endings = Counter(path.suffix.lower() for path in files_with("", root))
    counts = [f"{ending} {n}" for ending, n in endings.most_common() if ending == ".tar" or ending in image_endings()]
    if found := folders + counts:
        log.warning("%s: passed over, as they lie in none of its splits: %s", root, ", ".join(found))


def tell_others(folder: Path) -> None:
    """Log how many files of other kinds lie beside the tars, Parquet or idx files of a folder; images are counted elsewhere."""
    tars = files_with(".tar", folder)
    own = {SHARDS_MANIFEST, *(path.name for tar in tars for path in (tar, index_path(tar)))}
    own |= {path.name for path in files_with(".parquet", folder) if may_hold_images(path)}
    own |= {path.name for path in idx_files(folder)}
    others = Counter(path.suffix.lower() for path in files_with("", folder) if path.name not in own)
    if others := Counter({ending: count for ending, count in others.items() if ending not in image_endings()}):
        log.warning("%s: %s", folder, passed_over(others))
