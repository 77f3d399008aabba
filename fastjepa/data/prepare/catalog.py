"""Named data sets: fetched, checked, found again. Only complete sets ever appear under their final name."""

import difflib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastjepa.data.prepare.downloads import (
    CIFAR10_CLASSES,
    FASHION_CLASSES,
    cifar10_complete,
    fashion_mnist_complete,
    fetch_cifar10,
    fetch_fashion_mnist,
)
from fastjepa.data.prepare.write_scenes import scenes_complete, write_missing_labels, write_scenes
from fastjepa.errors import UserError
from fastjepa.files import atomic_path


@dataclass(frozen=True)
class NamedDataset:
    """A data set: the functions that fill a directory with it, see whether it is whole and complete it, and its class names."""

    fetch: Callable[[Path, Path | None], None]  # (empty directory, archive): raises one-sentence errors
    is_complete: Callable[[Path], bool]
    classes: tuple[str, ...]
    supplement: Callable[[Path], None] = lambda folder: None  # writes what an earlier version did not


def data_dir() -> Path:
    """Return the directory of named data sets: $FASTJEPA_DATA, or ~/.cache/fastjepa."""
    return Path(os.environ.get("FASTJEPA_DATA") or Path.home() / ".cache" / "fastjepa")


def get_dataset(name: str, directory: str | Path | None = None, archive: str | Path | None = None) -> Path:
    """Return the directory of data set `name`, fetched first where it is not there yet.

    One that an earlier version wrote gets what that did not write.

    Args:
        directory: holds the data sets, one folder each, in place of `data_dir()`.
        archive: a zip or tar to unpack in place of a download (cifar10: class folders below train/ and test/).

    UserError for an unknown name or an archive that does not hold the set; OSError, naming the remedy, when the set
    cannot be fetched or what is there is damaged.
    """
    entry, final = _dataset_of(name), Path(directory or data_dir()) / name
    if _holds_files(final):
        entry.supplement(final)
        return _checked(entry, final)
    make_folder(final.parent)
    try:
        with atomic_path(final) as fresh:
            make_folder(fresh)
            entry.fetch(fresh, Path(archive) if archive else None)
            if not entry.is_complete(fresh):
                said = "what was fetched is not the published data set; give a complete copy with --archive FILE"
                raise OSError(f"{name}: {said}")
    except OSError:
        if not _holds_files(final):  # else another process was first: its copy is checked below
            raise
    return _checked(entry, final)


def make_folder(folder: Path) -> Path:
    """Make a folder of the data directory and those above it, and return it; OSError that names the remedy."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error.strerror}); set FASTJEPA_DATA to a directory of yours") from error
    return folder


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def find_dataset(name: str) -> Path:
    """Return the directory of data set `name` without fetching or checksums; UserError says how to get it."""
    _dataset_of(name)
    if not (data_dir() / name).is_dir():
        raise UserError(f"data set {name} is not in {data_dir()}; run: fastjepa data get {name}")
    return data_dir() / name


def _dataset_of(name: str) -> NamedDataset:
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}; {closest_dataset(name)}")
    return DATASETS[name]


def closest_dataset(name: str) -> str:
    """Return the words that a message adds about a name that no data set has: the one that was meant, or all."""
    close = difflib.get_close_matches(name, DATASETS, n=1)
    return f"did you mean {close[0]!r}?" if close else f"data sets: {', '.join(DATASETS)}"


def _checked(entry: NamedDataset, path: Path) -> Path:
    """Return the path of a whole data set; OSError where it is not whole."""
    if not entry.is_complete(path):
        raise OSError(f"{path}: incomplete or damaged; delete it and run: fastjepa data get {path.name}")
    return path


def _render_scenes(folder: Path, archive: Path | None, size: int) -> None:
    """Fill a folder with scenes of `size` x `size` pixels."""
    if archive:
        raise UserError("scenes: --archive is for cifar10; scenes are rendered here, from no file")
    write_scenes(folder, size)


DATASETS = {
    "fashion-mnist": NamedDataset(fetch_fashion_mnist, fashion_mnist_complete, FASHION_CLASSES),
    "cifar10": NamedDataset(fetch_cifar10, cifar10_complete, CIFAR10_CLASSES),
    "scenes": NamedDataset(functools.partial(_render_scenes, size=64), scenes_complete, (), write_missing_labels),
    "scenes-128": NamedDataset(functools.partial(_render_scenes, size=128), scenes_complete, (), write_missing_labels),
}
