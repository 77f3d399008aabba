"""Bytes to pixels with Pillow: every format, upright, in one or three channels. Which file and which box, others decide."""

import io
import struct
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 89_478_485  # where Pillow starts to warn of decompression bombs; here they are refused

# What turns an image upright, by its EXIF orientation; 1 is upright already.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DAMAGED = "damaged metadata"  # the key in Header.info of an image whose metadata Pillow cannot read
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}  # of a PNG; the others are metadata, or name colours to leave out
T = TypeVar("T")


class Header(NamedTuple):
    """The facts that a file states about its image, read before any pixel is decoded."""

    height: int  # of the upright image, in pixels
    width: int
    format: str  # Pillow's names: JPEG, PNG, ...
    mode: str  # Pillow's: L, RGB, CMYK, ...
    orientation: int  # EXIF's, 1 where there is none
    animated: bool
    info: dict  # Pillow's: exif, xmp, ...


class DecodeError(ValueError):
    """Bytes that are no image this project can read; the message says why."""


def decode_image(raw: bytes | np.ndarray, channels: int) -> Tensor:
    """Return an image as (channels, H, W) uint8, upright.

    Args:
        raw: an encoded file, or pixels (H, W) or (H, W, 3) uint8, which need no decoding.
        channels: 1 (luminance, ITU-R 601-2) or 3 (RGB); alpha is dropped.

    EXIF rotation is applied; 16-bit grey is scaled to 8 bits (x * 255 / 65535, rounded). 16-bit colour keeps its high
    bytes, as Pillow reads it. Damaged metadata are passed over. DecodeError for pixels that Pillow cannot read in full, for
    images above MAX_PIXELS, and for 32-bit integer and floating-point pixels, which have no known range.
    """
    pixels = raw if isinstance(raw, np.ndarray) else _to_pixels(raw, channels)
    if pixels.ndim == 3 and channels == 1:
        pixels = np.array(Image.fromarray(pixels).convert("L"))
    image = torch.from_numpy(pixels)
    return image.permute(2, 0, 1) if image.ndim == 3 else image.expand(channels, -1, -1)


def read_header(raw: bytes) -> Header:
    """Return the header of an encoded file; DecodeError as `decode_image`, for what can be seen without decoding."""
    return _opened(raw, _header)


def stored_size(raw: bytes) -> tuple[int, int]:
    """Return (width, height) of an encoded file as stored, whatever they are; DecodeError where Pillow cannot open it."""
    return _read(raw, lambda image: image.size)


def _opened(raw: bytes, use: Callable[[Image.Image], T]) -> T:
    """Return use(image) of the file opened by Pillow; DecodeError as `_read`, and for an image above MAX_PIXELS."""

    def limited(image: Image.Image) -> T:
        if image.width * image.height > MAX_PIXELS:
            raise DecodeError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}; tile the image")
        return use(image)

    return _read(raw, limited)


def _read(raw: bytes, use: Callable[[Image.Image], T]) -> T:
    """Return use(image) of the file opened by Pillow; whatever Pillow's readers raise becomes a DecodeError.

    Where they fail on a PNG, its pixels are tried alone: they refuse the file for a text whose check sum is wrong, or for a
    colour profile above 1 MiB, neither of which is used here.
    """
    try:
        with Image.open(io.BytesIO(raw)) as image:
            return use(image)
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # they let any exception through: SyntaxError, struct.error, zlib.error, ...
        bare = _png_pixels(raw)
        if bare != raw:

            def use_bare(image: Image.Image) -> T:
                image.info[DAMAGED] = True
                return use(image)

            return _read(bare, use_bare)
        why = _why_unknown(raw) if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"
        raise DecodeError(f"not an image Pillow can read in full ({why})") from error


def _png_pixels(raw: bytes) -> bytes:
    """Return a PNG without its metadata, damaged chunks of pixels as they are; the bytes themselves where they are no PNG.

    A chunk is its length, its name, so many bytes, and a check sum: 12 bytes beside what it holds.
    """
    if not raw.startswith(PNG_SIGNATURE):
        return raw
    kept, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while start + 8 <= len(raw):
        length, name = struct.unpack_from(">I4s", raw, start)
        if name in PIXEL_CHUNKS:
            kept.append(raw[start : start + length + 12])
        start += length + 12
    return b"".join(kept)


def _why_unknown(raw: bytes) -> str:
    """Return why Pillow knows a file of no format: what the format that its first bytes are of says, which Pillow keeps."""
    for kind, (reader, accepts) in Image.OPEN.items():
        try:
            if accepts and accepts(raw[:16]) is True:
                reader(io.BytesIO(raw), "")
        except Exception as error:
            return f"{kind}: {error}"
    return f"it begins with {raw[:8]!r}, as no format that Pillow knows"


def _header(image: Image.Image) -> Header:
    # A PNG's EXIF may follow its pixels, for which Pillow would decode them: who reads PNG headers must look for it.
    late = image.format == "PNG" and "exif" not in image.info
    orientation = 1 if late else _orientation(image)
    # From 5 on, turning the image upright exchanges its sides.
    height, width = (image.width, image.height) if orientation > 4 else (image.height, image.width)
    return Header(height, width, image.format, image.mode, orientation, getattr(image, "is_animated", False), image.info)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) where there is none, one that EXIF does not know, or none that can be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # it lets any exception through, and no pixel depends on it
        image.info[DAMAGED] = True
        return 1
    return value if value in UPRIGHT else 1


def _to_pixels(raw: bytes, channels: int) -> np.ndarray:
    """Return the upright pixels of an encoded file, (H, W) or (H, W, 3) uint8."""

    def pixels(image: Image.Image) -> np.ndarray:
        image.load()  # a PNG's EXIF may follow its pixels
        turn = UPRIGHT.get(_orientation(image))
        return np.array(_eight_bit(image if turn is None else image.transpose(turn), channels))

    return _opened(raw, pixels)


def _eight_bit(image: Image.Image, channels: int) -> Image.Image | np.ndarray:
    """Return an image with 8 bits a channel: (H, W) for grey images or one channel, else RGB."""
    if image.mode == "F":
        raise DecodeError("floating-point pixels have no known range; save them as 8 or 16 bits")
    if image.mode.startswith("I"):
        return _scale_16_bit(np.asarray(image))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    grey = channels == 1 or image.mode in ("1", "L", "LA", "La")
    return image.convert("L" if grey else "RGB")


def _scale_16_bit(values: np.ndarray) -> np.ndarray:
    """Return 16-bit grey values as 8 bits, rounded: x * 255 / 65535 is x / 257, so 128 gives 0 and 129 gives 1."""
    if values.min() < 0 or values.max() > 65535:
        raise DecodeError("32-bit pixels have no known range; save them as 8 or 16 bits")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
