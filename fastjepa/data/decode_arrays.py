"""Bytes to measurements: the bands of TIFF, PNG and NumPy files in full depth. Which of them are channels, `pixels` decides.

tifffile reads TIFF, in any planar layout, tiled or in strips, and imagecodecs its compressions and PNG; both are the extra
`tiff`. Any other picture comes as `decode_pillow` makes it, in 8 bits.
"""

import io
import math
import zipfile
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from fastjepa.data.decode_pillow import (
    ORIENTED_PNG,
    PNG_SIGNATURE,
    DecodeError,
    orientation_of,
    picture_pixels,
    refuse_large,
)
from fastjepa.data.dropped import FRAMES, STATED_NODATA
from fastjepa.errors import UserError

TIFF_SIGNATURES = b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"  # the last two: BigTIFF
NPY_SIGNATURE, NPZ_SIGNATURE = b"\x93NUMPY", b"PK\x03\x04"
NPZ_KEY = "image"  # of the array in a .npz that holds several
NPY_HEADER = 1 << 16  # bytes, more than any header of an array of numbers
ORIENTATION_TAG, NODATA_TAG = 274, 42113  # EXIF's orientation, GDAL's no-data value
PALETTE, WHITE_ZERO = 3, 0  # photometric interpretations of TIFF

Pages = Literal["first", "bands"]


class Bands(NamedTuple):
    """The bands in a file, as they are stored."""

    values: np.ndarray  # (B, H, W), upright, of the file's own dtype; perhaps read-only
    dropped: frozenset[str]  # kinds of `dropped`
    pages: int = 1  # of a TIFF

    def __str__(self) -> str:
        count = len(self.values)
        return f"{count} band{'s' * (count > 1)} of {self.values.dtype.newbyteorder('=')}"


def is_numpy_file(raw: Any) -> bool:
    """Return whether bytes are those of a .npy or .npz file, which Pillow does not know."""
    return not isinstance(raw, np.ndarray) and bytes(raw[:8]).startswith((NPY_SIGNATURE, NPZ_SIGNATURE))


def decode_bands(raw: Any, count: int | None = None, pages: Pages = "first") -> Bands:
    """Return the bands in a file.

    Args:
        raw: the bytes of an encoded file, in any buffer, or pixels (H, W) or (H, W, 3) uint8, which need no decoding.
        count: how many bands to expect, by which those of a NumPy array are told from its rows and columns.
        pages: whether the bands of a TIFF are those of its first page, or those of all pages, which must be alike.

    A band of numbers of any width; EXIF rotation is applied, and a zero that is white made black. DecodeError for damaged
    files, for palettes, and for values that are no real numbers; UserError where a library is missing.
    """
    if isinstance(raw, np.ndarray):
        return Bands(raw[None] if raw.ndim == 2 else np.moveaxis(raw, 2, 0), frozenset())
    start = bytes(raw[:8])
    try:
        if start.startswith(TIFF_SIGNATURES):
            found = _tiff_bands(raw, pages)
        elif start == PNG_SIGNATURE:
            found = _png_bands(raw)
        elif is_numpy_file(start):
            found = Bands(bands_first(_numpy_array(raw), count), frozenset())
        else:
            pixels, dropped = picture_pixels(raw)
            found = Bands(pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0), dropped)
    except (DecodeError, UserError, MemoryError):
        raise
    except Exception as error:  # readers of damaged files let any exception through: struct.error, IndexError, zlib.error, ...
        raise DecodeError(f"cannot be read in full ({type(error).__name__}: {error})") from error
    if found.values.dtype.kind not in "uif":
        raise DecodeError(f"its values are of {found.values.dtype}, which are no real numbers; save it as numbers")
    return found


def bands_first(array: np.ndarray, count: int | None) -> np.ndarray:
    """Return an array (H, W), (H, W, B) or (B, H, W) as (B, H, W), a view.

    Bands are the first or the last axis: the one of `count` entries or, where that is not known, the shorter. With 12 bands
    (12, 64, 64) has them first and (64, 64, 12) last. DecodeError where neither or both fit, as of (12, 64, 12).
    """
    if array.ndim == 2:
        return array[None]
    if array.ndim != 3:
        raise DecodeError(f"an array of shape {array.shape} is no image; save it as (H, W), (H, W, bands) or (bands, H, W)")
    first, last = (side == (min(array.shape[0], array.shape[2]) if count is None else count) for side in array.shape[::2])
    if first and last:
        raise DecodeError(f"an array of shape {array.shape} has bands first or last, nobody knows; save its bands as a TIFF")
    if not first and not last:
        raise DecodeError(f"an array of shape {array.shape} has no axis of {count} bands, first or last; set data.channels to "
                          "its bands, or name some of them: data.bands")  # fmt: skip
    return array if first else np.moveaxis(array, 2, 0)


def _library(name: str) -> Any:
    """Return a module of the extra `tiff`; UserError where it is not installed."""
    try:
        import imagecodecs
        import tifffile
    except ImportError as error:
        needed = "data.dtype, data.channels and data.bands need tifffile and imagecodecs for TIFF and PNG files"
        raise UserError(f"{needed}; run: pip install 'fastjepa[tiff]'") from error
    return {"imagecodecs": imagecodecs, "tifffile": tifffile}[name]


def _tiff_bands(raw: Any, pages: Pages) -> Bands:
    """Return the bands of a TIFF; pages that are smaller copies, or masks, are not counted."""
    with _library("tifffile").TiffFile(io.BytesIO(raw)) as file:
        own = [page for page in file.pages if not page.is_reduced and not page.is_mask]
        if not own:
            raise DecodeError("has no page that is an image")
        taken = own if pages == "bands" else own[:1]
        if any((page.shape, page.dtype) != (own[0].shape, own[0].dtype) for page in taken):
            raise DecodeError("its pages differ in size or dtype, and are no bands of one image; set data.pages to first")
        found = [_page_bands(page) for page in taken]
        dropped = {FRAMES} if len(own) > len(taken) else set()
        if NODATA_TAG in own[0].tags:
            dropped.add(STATED_NODATA)
    return Bands(np.concatenate(found) if len(found) > 1 else found[0], frozenset(dropped), len(own))


def _page_bands(page: Any) -> np.ndarray:
    """Return the bands (B, H, W) of one page, upright."""
    refuse_large(page.imagewidth, page.imagelength)
    if page.photometric == PALETTE:
        raise DecodeError("its values are numbers of a palette's colours, no measurements; save it as RGB")
    values = page.asarray(maxworkers=1)
    if page.axes not in ("YX", "YXS", "SYX"):
        raise DecodeError(f"its axes are {page.axes}, not rows, columns and bands; save each plane as an image")
    values = {"YX": lambda: values[None], "YXS": lambda: np.moveaxis(values, 2, 0), "SYX": lambda: values}[page.axes]()
    if page.photometric == WHITE_ZERO and values.dtype.kind == "u":
        values = values.dtype.type(2**page.bitspersample - 1) - values
    return upright_bands(values, page.tags[ORIENTATION_TAG].value if ORIENTATION_TAG in page.tags else 1)


def upright_bands(values: np.ndarray, orientation: int) -> np.ndarray:
    """Return bands (B, H, W) of an EXIF orientation upright, a view; 1, and what EXIF does not know, is upright."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(1, 2)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    return values[:, ::down, ::across]


def _png_bands(raw: bytes) -> Bands:
    """Return the bands of a PNG, alpha among them; a palette as its colours, fewer than 8 bits as 8."""
    refuse_large(*(int.from_bytes(raw[at : at + 4]) for at in (16, 20)))
    values = _library("imagecodecs").png_decode(raw)
    values = values[None] if values.ndim == 2 else np.moveaxis(values, 2, 0)
    turned = any(word in raw for word in ORIENTED_PNG)
    return Bands(upright_bands(values, orientation_of(raw) if turned else 1), frozenset())


def _numpy_array(raw: Any) -> np.ndarray:
    """Return the array in a .npy, a view of its bytes, or in a .npz: its only one, or the one named NPZ_KEY."""
    if not bytes(raw[:4]).startswith(NPZ_SIGNATURE):
        header = io.BytesIO(raw[:NPY_HEADER])
        return _array_in(raw, *_numpy_header(header), header.tell())
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        names = archive.namelist()
        name = names[0] if len(names) == 1 else f"{NPZ_KEY}.npy"
        if name not in names:
            raise DecodeError(f"holds the arrays {', '.join(names)}, and none is named {NPZ_KEY}; name the one to take so")
        with archive.open(name) as member:
            head = _numpy_header(member)
            return _array_in(member.read(), *head, 0)


def _numpy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return (shape, whether columns come first, dtype) by the header of a .npy; DecodeError for objects and large images."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, columns_first, dtype = read[version](file)
    if dtype.hasobject:
        raise DecodeError("holds Python objects, which are not read; save it as numbers")
    if len(shape) in (2, 3):
        sides = sorted(shape)[-2:]
        refuse_large(sides[1], sides[0])
    return shape, columns_first, dtype


def _array_in(raw: Any, shape: tuple[int, ...], columns_first: bool, dtype: np.dtype, start: int) -> np.ndarray:
    """Return the array whose values begin at byte `start`, a view; ValueError where bytes are missing."""
    return np.frombuffer(raw, dtype, math.prod(shape), start).reshape(shape, order="F" if columns_first else "C")
