"""Bytes to pixels with Pillow: every format, upright, in one or three channels. Which file and which box, others decide.

Most JPEGs are decoded by simplejpeg, whose libjpeg-turbo makes the same bits as Pillow's and spares copies of them.
"""

import io
import struct
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from simplejpeg import decode_jpeg
from torch import Tensor

from fastjepa.data.dropped import ALPHA, BITS, NARROW, dropped_by_header, is_transparent

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
ORIENTED_PNG = (b"eXIf", b"Raw profile type", b"adobe.xmp")  # where a PNG may hide an orientation, even behind its pixels
BY_START = {b"\xff\xd8\xff": ("JPEG",), PNG_SIGNATURE: ("PNG",)}  # Pillow tries formats in turn, and takes long over some
PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}  # of a PNG; the others are metadata, or name colours to leave out
T = TypeVar("T")

# Kinds of grey TIFF that Pillow does not know, beside twins that it does: 12 bits in the other byte order, and what has a white
# zero. Their pixels are unpacked like the twins'; `_grey_levels` turns white zeros.
GREY_TIFFS = {(order, zero, (1,), 1, (12,), ()): ("I;16", "I;12") for order in (b"II", b"MM") for zero in (0, 1)}
GREY_TIFFS |= {(b"MM", 0, (1,), 1, (16,), ()): ("I;16B", "I;16B"), (b"II", 0, (1,), 2, (16,), ()): ("I;16", "I;16R")}
TiffImagePlugin.OPEN_INFO.update(GREY_TIFFS)


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


class Decoded(NamedTuple):
    """The image in a file, and what the file holds beside it."""

    image: Tensor  # (channels, H, W), upright; uint8, but for arrays
    dropped: frozenset[str]  # kinds of `dropped`
    held: str = ""  # of arrays: the bands in the file, such as "12 bands of uint16"


def decode_image(raw: bytes | np.ndarray, channels: int) -> Tensor:
    """Return an image as (channels, H, W) uint8, upright.

    Args:
        raw: an encoded file, or pixels (H, W) or (H, W, 3) uint8, which need no decoding.
        channels: 1 (luminance, ITU-R 601-2) or 3 (RGB); alpha is dropped.

    EXIF rotation is applied; 16-bit grey is scaled to 8 bits (x * 255 / 65535, rounded), and a zero that is white is white.
    16-bit colour keeps its high bytes, as Pillow reads it. Damaged metadata are passed over. DecodeError for pixels that
    Pillow cannot read in full, for images above MAX_PIXELS, and for signed, 32-bit and floating-point pixels, which have no
    known range.
    """
    return decode_file(raw, channels).image


def decode_file(raw: bytes | np.ndarray, channels: int) -> Decoded:
    """Return the image as `decode_image` does, with the kinds of what the file holds beside it."""
    pixels, dropped = (raw, frozenset()) if isinstance(raw, np.ndarray) else _to_pixels(raw, channels)
    if pixels.ndim == 3 and channels == 1:
        pixels = np.array(Image.fromarray(pixels).convert("L"))
    image = torch.from_numpy(pixels)
    return Decoded(image.permute(2, 0, 1) if image.ndim == 3 else image.expand(channels, -1, -1), dropped)


def picture_pixels(raw: bytes) -> tuple[np.ndarray, frozenset[str]]:
    """Return the upright pixels of a file, (H, W) uint8 of grey ones, else (H, W, 3), and the kinds of what else it holds.

    DecodeError as `decode_image`.
    """
    return _to_pixels(raw, 3)


def orientation_of(raw: bytes) -> int:
    """Return the EXIF orientation of a file, looked for behind its pixels too; 1 where there is none that can be read."""

    def read(image: Image.Image) -> int:
        image.load()
        return _orientation(image)

    return _opened(raw, read)


def read_header(raw: bytes) -> Header:
    """Return the header of an encoded file; DecodeError as `decode_image`, for what can be seen without decoding."""
    return _opened(raw, _header)


def stored_size(raw: bytes) -> tuple[int, int]:
    """Return (width, height) of an encoded file as stored, whatever they are; DecodeError where Pillow cannot open it."""
    return _read(raw, lambda image: image.size)


def _opened(raw: bytes, use: Callable[[Image.Image], T]) -> T:
    """Return use(image) of the file opened by Pillow; DecodeError as `_read`, and for an image above MAX_PIXELS."""

    def limited(image: Image.Image) -> T:
        refuse_large(image.width, image.height)
        return use(image)

    return _read(raw, limited)


def refuse_large(width: int, height: int) -> None:
    """Raise DecodeError for an image above MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width}x{height} pixels are more than {MAX_PIXELS}; tile the image")


def _read(raw: bytes, use: Callable[[Image.Image], T]) -> T:
    """Return use(image) of the file opened by Pillow; whatever Pillow's readers raise becomes a DecodeError.

    Where they fail on a PNG, its pixels are tried alone: they refuse the file for a text whose check sum is wrong, or for a
    colour profile above 1 MiB, neither of which is used here.
    """
    try:
        with Image.open(io.BytesIO(raw), formats=_formats(raw)) as image:
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


def _formats(raw: bytes) -> tuple[str, ...] | None:
    """Return the one format that the first bytes are of, where they are a JPEG's or a PNG's; None: any."""
    return next((formats for start, formats in BY_START.items() if raw.startswith(start)), None)


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
            arrays = "; more bands or bits than a picture's are read by data.channels and data.dtype" if kind == "TIFF" else ""
            return f"{kind}: {error}{arrays}"
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


def _to_pixels(raw: bytes, channels: int) -> tuple[np.ndarray, frozenset[str]]:
    """Return the upright pixels of an encoded file, (H, W) or (H, W, 3) uint8, and the kinds of what else it holds."""

    def pixels(image: Image.Image) -> tuple[np.ndarray, frozenset[str]]:
        dropped = dropped_by_header(image, raw)
        decoded = _upright_jpeg(image, raw)
        if decoded is not None:
            return decoded, frozenset(dropped)
        image.load()  # a PNG's EXIF may follow its pixels
        _refuse_unknown_range(image)
        if is_transparent(image):
            dropped.add(ALPHA)
        values, lost = _grey_levels(image) if image.mode.startswith("I") else (None, set())
        upright = image if values is None else Image.fromarray(values)
        turn = UPRIGHT.get(_orientation(image))
        return np.array(_eight_bit(upright if turn is None else upright.transpose(turn), channels)), frozenset(dropped | lost)

    return _opened(raw, pixels)


def _upright_jpeg(image: Image.Image, raw: bytes) -> np.ndarray | None:
    """Return the pixels of a grey or RGB JPEG that needs no turning, (H, W) or (H, W, 3) uint8, as Pillow would decode them.

    None for all else, and for a damaged file: Pillow says what is wrong with it, or reads it after all.
    """
    if image.format != "JPEG" or image.mode not in ("L", "RGB") or _orientation(image) != 1:
        return None
    try:
        pixels = decode_jpeg(raw, "RGB" if image.mode == "RGB" else "GRAY")
    except ValueError:
        return None
    return pixels if image.mode == "RGB" else pixels[:, :, 0]


def _refuse_unknown_range(image: Image.Image) -> None:
    """Raise DecodeError for values of which nobody knows what is black and what is white; 32 bits that 16 hold count as 16."""
    signed_bytes = image.mode == "L" and 2 in getattr(image, "tag_v2", {}).get(TiffImagePlugin.SAMPLEFORMAT, ())
    low, high = image.getextrema() if image.mode == "I" else (0, 0)
    kind = "floating-point" if image.mode == "F" else "signed" if signed_bytes or low < 0 else "32-bit" if high > 65535 else ""
    if kind:
        raise DecodeError(f"{kind} pixels have no known range; save them as 8 or 16 bits, or set data.dtype float32")


def _eight_bit(image: Image.Image, channels: int) -> Image.Image:
    """Return an image with 8 bits a channel: L for grey images or one channel, else RGB."""
    if image.mode == "La":  # grey times alpha: Pillow turns it into nothing else
        image = image.convert("LA")
    if image.mode == "LAB" or image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGB" if image.mode == "LAB" else "RGBA")
    mode = "L" if channels == 1 or image.mode in ("1", "L", "LA") else "RGB"
    return image if image.mode == mode else image.convert(mode)  # which would copy it


def _grey_levels(image: Image.Image) -> tuple[np.ndarray, set[str]]:
    """Return the pixels of an image with more than 8 bits of grey as (H, W) uint8, and the kinds of what they lose.

    Rounded, x * 255 / 65535 is x / 257: 128 gives 0 and 129 gives 1, and of multiples of 257 nothing is lost. A TIFF with 12
    bits has 4095 in place of 65535.
    """
    values, tags = np.asarray(image).astype(np.int32), getattr(image, "tag_v2", {})
    top = 4095 if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,) else 65535
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # zero is white
        values = top - values
    scaled = (values * 255 + top // 2) // top
    if not np.any(scaled * top != values * 255):
        return scaled.astype(np.uint8), set()
    return scaled.astype(np.uint8), {NARROW if top == 65535 and values.max() < 4096 else BITS}
