"""Pixels of a data set: what becomes of the bytes of any of its files, by the keys of the config's section `data`.

Pictures are 1 or 3 channels of 8 bits, which Pillow makes of any file. Arrays are all else: the values of a file's bands
are kept, in uint8, uint16 or float32.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastjepa.data.decode_arrays import Bands, Pages, decode_bands, is_numpy_file
from fastjepa.data.decode_pillow import Decoded, decode_file
from fastjepa.data.dropped import NODATA, ROUNDED
from fastjepa.errors import UserError

MeanStd = tuple[tuple[float, ...], tuple[float, ...]]  # of each channel


def unit_of(dtype: torch.dtype) -> float:
    """Return the value that counts as 1 in pixels of a dtype: 255 of uint8, 65535 of uint16, 1 of floats."""
    return 1.0 if dtype.is_floating_point else float(torch.iinfo(dtype).max)


class UnlikeError(UserError):
    """A whole file whose bands are not those that the config says; the message begins behind the file's name."""


@dataclass(frozen=True)
class Pixels:
    """Pixels of every image of a data set; see the config's keys of the same names."""

    channels: int
    dtype: torch.dtype = torch.uint8  # or uint16, float32
    bands: tuple[int, ...] | None = None
    pages: Pages = "first"
    nodata: float | None = None
    mean_std: MeanStd | None = None  # where `unit_of(dtype)` counts as 1

    def __str__(self) -> str:
        """Return how many channels of which dtype they are, as a sentence says it."""
        return f"{self.channels} channel{'s' if self.channels > 1 else ''} of {str(self.dtype).removeprefix('torch.')}"

    @property
    def are_pictures(self) -> bool:
        """Return whether Pillow makes the channels, of whatever bands a file has."""
        plain = self.bands is None and self.nodata is None and self.pages == "first"
        return plain and self.dtype == torch.uint8 and self.channels in (1, 3)

    def decode(self, raw) -> Decoded:
        """Return an image (channels, H, W) of `dtype`, upright, values without measurement filled with their channel's mean.

        Args:
            raw: the bytes of an encoded file, in any buffer, or pixels (H, W) or (H, W, 3) uint8.

        DecodeError for what cannot be read; UnlikeError for bands of another number or dtype.
        """
        if self.are_pictures and not is_numpy_file(raw):
            return decode_file(raw, self.channels)
        values, missing, found = self.measurements(raw)
        if missing.any():
            values, found = np.where(missing, self.fill, values), found._replace(dropped=found.dropped | {NODATA})
        image = torch.from_numpy(values if values.flags.writeable and min(values.strides) >= 0 else values.copy())
        return Decoded(image, found.dropped, str(found))

    def measurements(self, raw) -> tuple[np.ndarray, np.ndarray, Bands]:
        """Return an image (channels, H, W) of `dtype`, where it has no measurement (bool, or () for nowhere), and its file.

        Arguments and errors as `decode`, of arrays; `dropped` of the file names what the conversion to `dtype` loses too.
        """
        found = decode_bands(raw, None if self.bands else self.channels, self.pages)
        self._refuse_unlike(found)
        values = found.values if self.bands is None else found.values[list(self.bands)]
        values, dropped = self._converted(values)
        return values, self._missing(values), found._replace(dropped=found.dropped | dropped)

    def ready(self, image: Tensor) -> Tensor:
        """Return an image, or several (..., C, H, W), as the network takes it: floats normalised, whole numbers as they are."""
        return normalise_pixels(image, self.mean_std) if image.is_floating_point() else image

    def _refuse_unlike(self, found: Bands) -> None:
        """Raise UnlikeError for bands that the keys do not go with."""
        count, name = len(found.values), np.dtype(found.values.dtype.newbyteorder("=")).name
        wanted = str(self.dtype).removeprefix("torch.")
        paged = found.pages > 1 and self.pages == "first"
        more = f", set data.pages to bands for those of its {found.pages} pages" if paged else ""
        if self.bands is None and count != self.channels:
            raise UnlikeError(f"holds {found}, and data.channels is {self.channels}; set that to {count}, choose some by "
                              f"data.bands{more}, or remove the file")  # fmt: skip
        if self.bands and max(self.bands) >= count:
            raise UnlikeError(f"holds {found}, counted from 0, and data.bands asks for band {max(self.bands)}; ask for bands "
                              f"below {count}{more}, or remove the file")  # fmt: skip
        if wanted not in (name, "float32"):
            remedy = name if name in ("uint8", "uint16") else "float32"
            raise UnlikeError(f"holds {found}, and data.dtype is {wanted}; set that to {remedy}, or remove the file")

    def _converted(self, values: np.ndarray) -> tuple[np.ndarray, set[str]]:
        """Return values in `dtype`, and the kinds of what they lose: float32 holds no more than 24 bits of a number."""
        wanted = np.dtype(str(self.dtype).removeprefix("torch."))
        if np.can_cast(values.dtype, wanted, "safe"):
            return values.astype(wanted, copy=False), set()
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which counts as no measurement
            narrow = values.astype(wanted)
        return narrow, set() if np.array_equal(narrow, values, equal_nan=values.dtype.kind == "f") else {ROUNDED}

    def _missing(self, values: np.ndarray) -> np.ndarray:
        """Return where values are no measurement, bool of their shape, or of shape () where none can be."""
        missing = ~np.isfinite(values) if values.dtype.kind == "f" else np.zeros((), bool)
        return missing if self.nodata is None else missing | (values == values.dtype.type(self.nodata))

    @cached_property
    def fill(self) -> np.ndarray:
        """The mean of each channel, (C, 1, 1) of `dtype`; 0 where none is known, as before a run."""
        mean = np.array(self.mean_std[0] if self.mean_std else [0.0] * self.channels)[:, None, None] * unit_of(self.dtype)
        return (mean if self.dtype == torch.float32 else mean.round()).astype(str(self.dtype).removeprefix("torch."))


RGB_PICTURES = Pixels(3)  # the default config's


def normalise_pixels(pixels: Tensor, mean_std: MeanStd) -> Tensor:
    """Return pixels (..., C, H, W) of any dtype as fp32, with the given mean and standard deviation taken out.

    `mean_std` is per channel, where `unit_of(pixels.dtype)` counts as 1: of bytes on [0, 1].
    """
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in mean_std)
    return (pixels.float() / unit_of(pixels.dtype) - mean) / std
