"""Mean, deviation, range and missing values of each channel of a data set, in one pass: the work of `fastjepa data stats`."""

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fastjepa.data.decode_arrays import TIFF_SIGNATURES, Pages, decode_bands, is_numpy_file
from fastjepa.data.decode_pillow import MAX_PIXELS, PNG_SIGNATURE, DecodeError, decode_file
from fastjepa.data.pixels import Pixels, UnlikeError, unit_of
from fastjepa.data.prepare.check_images import IMAGES_A_TASK, MEGA, BadImage, add_unreadable, gather_findings, judge_image
from fastjepa.data.prepare.processes import map_in_processes
from fastjepa.data.sources import Source
from fastjepa.errors import UserError, is_out_of_files
from fastjepa.rng import SPLIT_STREAM, generator

STATISTICS_DRAW = 1 << 39  # step of SPLIT_STREAM; fastjepa/evals/scoring.py lists the others


@dataclass(frozen=True)
class Moments:
    """Counts, means and squares of the values of C bands: arrays (C,) float64, which two parts of the data can be merged by."""

    count: np.ndarray  # values that are measured
    missing: np.ndarray  # values that are not
    mean: np.ndarray
    squares: np.ndarray  # sum of the squared distances to the mean
    least: np.ndarray
    most: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, missing: np.ndarray) -> "Moments":
        """Return the moments of an image (C, H, W) of any dtype, without the values where `missing`, bool or (), is True."""
        flat, there = values.reshape(len(values), -1).astype(np.float64), ~np.broadcast_to(missing, values.shape)
        there = there.reshape(flat.shape)
        count = there.sum(axis=1).astype(np.float64)
        mean = flat.sum(axis=1, where=there) / np.maximum(count, 1)
        # Squares of large values would keep no digit of their spread, those of distances do.
        squares = np.square(flat - mean[:, None]).sum(axis=1, where=there)
        least, most = flat.min(axis=1, where=there, initial=np.inf), flat.max(axis=1, where=there, initial=-np.inf)
        return cls(count, flat.shape[1] - count, mean, squares, least, most)

    def merged(self, other: "Moments") -> "Moments":
        """Return the moments of both parts together (Chan, Golub and LeVeque 1979).

        The means 2 and 6 of 3 values and 1 give 3; their distance of 4 adds 16 * 3 * 1 / 4 = 12 to the squares.
        """
        count, apart = self.count + other.count, other.mean - self.mean
        share = other.count / np.maximum(count, 1)
        return Moments(
            count,
            self.missing + other.missing,
            self.mean + apart * share,
            self.squares + other.squares + np.square(apart) * self.count * share,
            np.minimum(self.least, other.least),
            np.maximum(self.most, other.most),
        )

    def rows(self) -> list[dict[str, float]]:
        """Return mean, std, least and greatest value, count of values and share of missing ones, of each band."""
        share = self.missing / np.maximum(self.count + self.missing, 1)
        columns = {
            "mean": self.mean,
            "std": self.std,
            "least": self.least,
            "most": self.most,
            "values": self.count,
            "missing": share,
        }
        return [{name: float(values[band]) for name, values in columns.items()} for band in range(len(self.count))]

    @property
    def std(self) -> np.ndarray:
        """Return the standard deviation of each band, over all of its values."""
        return np.sqrt(self.squares / np.maximum(self.count, 1))


@dataclass(frozen=True)
class BandRequest:
    """The images that are measured, and what the config says of their pixels; None where their first file says it."""

    limit: int | None = None  # images, drawn at random with a fixed seed; None for all
    channels: int | None = None
    dtype: torch.dtype | None = None
    bands: tuple[int, ...] | None = None
    pages: Pages = "first"
    nodata: float | None = None

    def pixels(self, raw: bytes | np.ndarray) -> tuple[Pixels, bool]:
        """Return what becomes of files like this one, and whether grey pictures are one channel until a coloured one comes.

        Files of more than 8 bits, TIFFs of 2 or more than 3 bands and NumPy files are arrays of all of their bands, and any
        others pictures, where the request says nothing else.
        """
        picture = self.bands is None and self.pages == "first" and self.nodata is None and not is_numpy_file(raw)
        if picture and self.dtype in (None, torch.uint8) and not _may_be_deep(raw):
            return Pixels(self.channels or 3), self.channels is None
        found = decode_bands(raw, self.channels, self.pages).values
        dtype = self.dtype or _narrowest(found.dtype)
        if picture and self.channels is None and dtype == torch.uint8 and len(found) in (1, 3):
            return Pixels(3), True
        channels = self.channels or len(found) if self.bands is None else len(self.bands)
        return Pixels(channels, dtype, self.bands, self.pages, self.nodata), False


def _may_be_deep(raw: bytes | np.ndarray) -> bool:
    """Return whether a file may hold other than 8 bits a channel: a TIFF, a NumPy file, a PNG of 16 bits."""
    if isinstance(raw, np.ndarray):
        return False
    start = bytes(raw[:8])
    return is_numpy_file(raw) or start.startswith(TIFF_SIGNATURES) or start == PNG_SIGNATURE and raw[24] > 8


def _narrowest(dtype: np.dtype) -> torch.dtype:
    """Return the dtype of `data.dtype` that takes the numbers of a file."""
    return {"uint8": torch.uint8, "uint16": torch.uint16}.get(dtype.newbyteorder("=").name, torch.float32)


@dataclass
class BandReport:
    """The findings on a source, or on a part of it."""

    images: int = 0  # read, bad ones among them
    moments: dict[int, Moments] = field(default_factory=dict)  # by the number of channels
    bad: list[BadImage] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)  # files by kind of `data.dropped`

    def add(self, part: "BandReport") -> None:
        """Take in the findings on a part of the images."""
        self.images += part.images
        for channels, found in part.moments.items():
            self.moments[channels] = self.moments[channels].merged(found) if channels in self.moments else found
        self.bad += part.bad
        self.dropped += part.dropped

    @property
    def channels(self) -> Moments:
        """Return the moments of each channel; grey pictures are three equal channels among coloured ones, by broadcasting."""
        return functools.reduce(Moments.merged, self.moments.values())


def measure_bands(
    source: Source, request: BandRequest, workers: int, show: Callable[[BadImage], None] = lambda bad: None
) -> tuple[BandReport, Pixels]:
    """Measure the channels of a source's images in `workers` processes; the result does not depend on their number.

    Every value counts alike, so that a large image counts more than a small one. `show` is called with each bad file when it
    is found. Returned with the report: what the images were read as, of as many channels as were found.

    A file that has other bands than the first one is bad. UserError where all are, or a channel has no measurement.
    """
    report = BandReport()
    add_unreadable(report, source, show)
    rows = rows_to_measure(len(source), request.limit)
    pixels, apart = _pixels_of(source, request, rows)
    chunks = [rows[start : start + IMAGES_A_TASK] for start in range(0, len(rows), IMAGES_A_TASK)]
    gather_findings(report, map_in_processes(_measure_chunk, (source, pixels, apart), chunks, workers), len(rows), show)
    if not report.moments:
        raise UserError(
            f"none of {report.images} images can be read, for example {report.bad[-1]}; fastjepa data check names all"
        )
    for channel in np.flatnonzero(report.channels.count == 0)[:1]:
        raise UserError(f"channel {channel} has no value that is measured; leave it out by --bands, or change --nodata")
    return report, replace(pixels, channels=max(report.moments))


def config_lines(channels: Moments, pixels: Pixels) -> dict[str, Any]:
    """Return the keys of the config's section `data` for images with such moments, read as such pixels; defaults are left out.

    Mean and deviation are in the config's units: what `unit_of` says counts as 1.
    """
    unit = unit_of(pixels.dtype)
    stated = {
        "dtype": str(pixels.dtype).removeprefix("torch."),
        "bands": pixels.bands,
        "pages": pixels.pages,
        "nodata": pixels.nodata,
    }
    defaults = {"dtype": "uint8", "bands": None, "pages": "first", "nodata": None}
    mean, std = ([float(f"{value / unit:.5g}") for value in values] for values in (channels.mean, channels.std))
    return {"channels": pixels.channels, "mean": mean, "std": std} | {
        name: value for name, value in stated.items() if value != defaults[name]
    }


def rows_to_measure(total: int, limit: int | None) -> np.ndarray:
    """Return the rows of `total`, or `limit` of them at random, in the order of the files; a fixed seed draws them."""
    if limit is None or limit >= total:
        return np.arange(total)
    return np.sort(generator(0, SPLIT_STREAM, STATISTICS_DRAW).permutation(total)[:limit])


def _pixels_of(source: Source, request: BandRequest, rows: np.ndarray) -> tuple[Pixels, bool]:
    """Return what the request makes of the first file that can be read."""
    for row in map(int, rows):
        with contextlib.suppress(DecodeError, OSError):
            return request.pixels(source.read(row))
    return Pixels(3), True


def _measure_chunk(job: tuple[Source, Pixels, bool], rows: Sequence[int]) -> BandReport:
    """Return the findings on some rows."""
    source, pixels, apart = job
    part = BandReport(images=len(rows))
    for row in map(int, rows):
        try:
            with warnings.catch_warnings(action="ignore"):  # Pillow's say neither which file nor what to do
                values, missing, dropped = _measurements(source.read(row), pixels, apart)
        except (DecodeError, UnlikeError, MemoryError, OSError) as error:
            if is_out_of_files(error):
                raise  # no fault of the file
            part.bad.append(_bad_image(source, row, pixels, error))
        else:
            part.add(BandReport(moments={len(values): Moments.of(values, missing)}, dropped=Counter(dropped)))
    return part


def _measurements(raw: bytes | np.ndarray, pixels: Pixels, apart: bool) -> tuple[np.ndarray, np.ndarray, frozenset[str]]:
    """Return the values of a file (C, H, W), where it has none, and what is left out; of grey pictures `apart` one channel."""
    if not pixels.are_pictures or is_numpy_file(raw):
        values, missing, found = pixels.measurements(raw)
        return values, missing, found.dropped
    image, dropped, _ = decode_file(raw, pixels.channels)
    grey = apart and image.stride(0) == 0  # one channel, expanded to three
    return (image[:1] if grey else image).numpy(), np.zeros((), bool), dropped


def _bad_image(source: Source, row: int, pixels: Pixels, error: Exception) -> BadImage:
    """Return what `data check` would say of a file that cannot be read."""
    found = judge_image(source, row, MAX_PIXELS / MEGA, pixels)
    return found if isinstance(found, BadImage) else BadImage(source.name(row), "cannot be decoded", str(error))
