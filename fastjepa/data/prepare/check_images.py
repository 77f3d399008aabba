"""A check of every image of a source, to know the bad ones before a run meets them: the work of `fastjepa data check`."""

import contextlib
import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from fastjepa.data.decode_arrays import is_numpy_file
from fastjepa.data.decode_pillow import MAX_PIXELS, DecodeError, decode_file, stored_size
from fastjepa.data.pixels import RGB_PICTURES, Pixels, UnlikeError
from fastjepa.data.prepare.processes import counting_bar, map_in_processes
from fastjepa.data.sources import Source, open_source
from fastjepa.data.splits import acceptable_splits, split_folder
from fastjepa.data.tar_shards import SHARDS_MANIFEST, index_of, read_manifest, tars_in
from fastjepa.errors import UserError, is_out_of_files
from fastjepa.files import write_atomic

IMAGES_A_TASK = 64  # images that a process is given at a time
MEGA = 1_000_000


@dataclass(frozen=True)
class BadImage:
    """A file that a run could not use, with the reason in a word or two and the words of its reader."""

    path: str
    reason: str  # zero bytes, not an image, truncated, cannot be decoded, too large, other bands, vanished, unreadable, ...
    detail: str

    def __str__(self) -> str:
        return f"{one_line(self.path)}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class GoodImage(NamedTuple):
    """A file that a run can use."""

    size: tuple[int, int]  # (width, height) as stored
    dropped: frozenset[str]  # kinds of `data.dropped`
    held: str = ""  # of arrays: "12 bands of uint16"


class Findings(Protocol):
    """A report on images, to which reports on parts of them are added."""

    images: int
    bad: list[BadImage]

    def add(self, part: Any) -> None:
        """Take in the findings on a part of the images."""


@dataclass
class CheckReport:
    """The findings of a check; sizes are (width, height) as stored."""

    images: int = 0
    shards: int = 0  # compared with their manifest
    bad: list[BadImage] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)  # files by kind of `data.dropped`: good, but not taken whole
    held: Counter[str] = field(default_factory=Counter)  # good arrays by their bands
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None

    def add_size(self, size: tuple[int, int]) -> None:
        """Widen the range of sizes to one more image; an image is as large as its number of pixels."""
        self.smallest = min(self.smallest or size, size, key=np.prod)
        self.largest = max(self.largest or size, size, key=np.prod)

    def add(self, part: "CheckReport") -> None:
        """Take in the findings on a part of the images."""
        self.images += part.images
        self.bad += part.bad
        self.dropped += part.dropped
        self.held += part.held
        for size in filter(None, (part.smallest, part.largest)):
            self.add_size(size)

    def by_reason(self) -> dict[str, int]:
        """Return how many files are bad for each reason, the most frequent first."""
        return dict(Counter(bad.reason for bad in self.bad).most_common())


def check_images(
    where: str,
    split: str = "train",
    workers: int = 1,
    max_pixels: float | None = None,
    show: Callable[[BadImage], None] = lambda bad: None,
    pixels: Pixels = RGB_PICTURES,
) -> CheckReport:
    """Read every image of a source in `workers` processes; bad is what a run cannot decode to `pixels`, and what is too large.

    Shards are first compared with their manifest, where they have one: counts, sizes and SHA-256. When one is damaged the
    images are not read.

    Args:
        where, split: as in `open_source`, whose errors pass.
        max_pixels: the limit in megapixels, judged by the header before anything is decoded, of
            arrays thereafter; default, and at most, what a
            run decodes.
        show: called with each bad file when it is found.
    """
    most = MAX_PIXELS / MEGA
    limit = most if max_pixels is None else max_pixels
    if not 0 < limit <= most:
        raise UserError(f"--max-pixels {limit:g} is not above 0 and at most {most:g}, the megapixels that a run decodes")
    report = CheckReport()
    # A damaged shard has a damaged index, by which no image of it could be read.
    _check_shards(report, where, split, workers, show)
    if not report.bad:
        _read_all(report, open_source(where, split), workers, (limit, pixels), show)
    return report


def _read_all(
    report: CheckReport, source: Source, workers: int, asked: tuple[float, Pixels], show: Callable[[BadImage], None]
) -> None:
    """Add to the report what a reading of all images finds, and what the source could not open; `asked` as `judge_image`."""
    add_unreadable(report, source, show)
    chunks = [range(start, min(start + IMAGES_A_TASK, len(source))) for start in range(0, len(source), IMAGES_A_TASK)]
    gather_findings(report, map_in_processes(_read_chunk, (source, *asked), chunks, workers), len(source), show)


def add_unreadable(report: Findings, source: Source, show: Callable[[BadImage], None]) -> None:
    """Add to a report, and show, what the source could not open."""
    for path, reason in getattr(source, "unreadable", ()):
        report.bad.append(BadImage(path, "damaged shard" if path.endswith(".tar") else "unreadable", reason))
        show(report.bad[-1])


def gather_findings(
    report: Findings, found: Generator[Findings, None, None], total: int, show: Callable[[BadImage], None]
) -> None:
    """Add the findings of processes on parts of `total` images to a report, under a bar; show each bad file."""
    with contextlib.closing(found) as parts, counting_bar() as progress:
        task = progress.add_task("images", total=total)
        for part in parts:
            report.add(part)
            for bad in part.bad:
                show(bad)
            progress.advance(task, part.images)


def _read_chunk(job: tuple[Source, float, Pixels], chunk: range) -> CheckReport:
    """Return the findings on a range of samples."""
    source, limit, pixels = job
    part = CheckReport(images=len(chunk))
    for i in chunk:
        with warnings.catch_warnings(action="ignore"):  # Pillow's say neither which file nor what to do
            found = judge_image(source, i, limit, pixels)
        if isinstance(found, BadImage):
            part.bad.append(found)
        else:
            part.add_size(found.size)
            part.dropped.update(found.dropped)
            part.held.update(filter(None, [found.held]))
    return part


def judge_image(source: Source, i: int, limit: float, pixels: Pixels = RGB_PICTURES) -> BadImage | GoodImage:
    """Return the size of a sample that a run can decode to `pixels`, or why it cannot; `limit` in megapixels."""
    try:
        raw = source.read(i)
    except OSError as error:
        if is_out_of_files(error):
            raise  # no fault of the file
        reason = "vanished" if isinstance(error, FileNotFoundError) else "unreadable"
        return BadImage(source.name(i), reason, error.strerror or str(error))
    if isinstance(raw, np.ndarray) and pixels.are_pictures:
        return GoodImage((raw.shape[1], raw.shape[0]), frozenset())
    if not len(raw):
        return BadImage(source.name(i), "zero bytes", "")
    if not pixels.are_pictures or is_numpy_file(raw):
        return _judge_array(source.name(i), raw, limit, pixels)
    try:
        size = stored_size(raw)
    except DecodeError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):
            return BadImage(source.name(i), "too large", str(error.__cause__))
        return BadImage(source.name(i), "not an image", str(error).partition("(")[2].removesuffix(")"))
    if size[0] * size[1] > limit * MEGA:
        return BadImage(source.name(i), "too large", f"{size[0]}x{size[1]}, {size[0] * size[1] / MEGA:.1f} megapixels")
    try:
        return GoodImage(size, decode_file(raw, 3).dropped)
    except MemoryError:
        return BadImage(source.name(i), "too large", f"{size[0]}x{size[1]}, no memory to decode it")
    except DecodeError as error:
        said = str(error.__cause__ or error)
        return BadImage(source.name(i), "truncated" if "truncated" in said else "cannot be decoded", said)


def _judge_array(name: str, raw: bytes, limit: float, pixels: Pixels) -> BadImage | GoodImage:
    """Return the size and the bands of an array, or why a run cannot use it; `limit` in megapixels."""
    try:
        image, dropped, held = pixels.decode(raw)
    except MemoryError:
        return BadImage(name, "too large", "no memory to decode it")
    except DecodeError as error:
        return BadImage(name, "cannot be decoded", str(error))
    except UnlikeError as error:
        return BadImage(name, "other bands", str(error))
    height, width = image.shape[1:]
    if width * height > limit * MEGA:
        return BadImage(name, "too large", f"{width}x{height}, {width * height / MEGA:.1f} megapixels")
    return GoodImage((width, height), dropped, held)


def _check_shards(report: CheckReport, where: str, split: str, workers: int, show: Callable[[BadImage], None]) -> None:
    """Add to the report what differs between a directory of shards and its manifest, where it has one."""
    folder = Path(os.path.expanduser(where))
    if not folder.is_dir():
        return
    # Other formats keep their splits elsewhere; `open_source` has the last word.
    with contextlib.suppress(UserError, PermissionError):
        folder = split_folder(folder, acceptable_splits(split))
    manifest = read_manifest(folder)
    if manifest is None:
        return
    entries = manifest["shards"]
    unknown = {path.name for path in tars_in(folder)} - {entry["file"] for entry in entries}
    report.bad += [BadImage(str(folder / name), "damaged shard", f"not in {SHARDS_MANIFEST}") for name in sorted(unknown)]
    with contextlib.closing(map_in_processes(_check_shard, folder, entries, workers)) as found, counting_bar() as progress:
        report.bad += filter(None, progress.track(found, total=len(entries), description="shards"))
    report.shards = len(entries)
    for bad in report.bad:
        show(bad)


def _check_shard(folder: Path, entry: dict) -> BadImage | None:
    """Return the first thing that is wrong with a shard by its entry in the manifest; None where all is right."""
    path = folder / entry["file"]
    try:
        with open(path, "rb") as file:
            size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        images = len(index_of(path).members) if digest == entry["sha256"] else None
    except FileNotFoundError:
        return BadImage(str(path), "vanished", f"listed in {SHARDS_MANIFEST}")
    except OSError as error:
        if is_out_of_files(error):
            raise
        return BadImage(str(path), "unreadable", error.strerror or str(error))
    stated = entry["bytes"], entry["sha256"], entry["images"]
    for name, is_, said in zip(("bytes", "SHA-256", "images"), (size, digest, images), stated, strict=True):
        if is_ != said:
            return BadImage(str(path), "damaged shard", f"{name} {is_}, in {SHARDS_MANIFEST} {said}")
    return None


def write_bad_list(bad: list[BadImage], path: Path) -> None:
    """Write each path once, one a line, as the file system spells it but for line ends and backslashes: see `one_line`."""
    write_atomic(path, b"".join(os.fsencode(one_line(name)) + b"\n" for name in dict.fromkeys(entry.path for entry in bad)))


def one_line(path: str) -> str:
    r"""Return a path without line ends: a backslash is written as \\, a line feed as \n, a carriage return as \r."""
    return path.replace("\\", r"\\").replace("\n", r"\n").replace("\r", r"\r")
