"""Parts of a file that its image leaves out or replaces: bits, frames, bands, transparency. Each completes "the file holds"."""

import numpy as np
from PIL import Image, TiffImagePlugin

BITS = "more than 8 bits a channel, of which 8 are kept"
NARROW = "16-bit grey levels that all lie below 4096, of which 17 at most are kept"
FRAMES = "further frames or pages, of which the first is kept"
BANDS = "further bands beside colour and alpha, which are left out"
ALPHA = "transparency, which is left out"
NODATA = "values without measurement, which are filled with their channel's mean"
STATED_NODATA = "a no-data value in its tags, which counts as a measurement unless data.nodata names it"
ROUNDED = "numbers of more than 24 bits, which are rounded to float32"

SIZ_TO_DEPTH = 40  # bytes from a JPEG 2000's size marker to the depth of its first component, less one
AV1C_TO_DEPTH = 6  # bytes from the name of an AVIF's configuration to the flags of its depth
HIGH_BITDEPTH = 0x40


def dropped_by_header(image: Image.Image, raw: bytes) -> set[str]:
    """Return the kinds that an opened file shows before Pillow decodes it; of grey levels their values decide, not the header.

    Layers of a PSD are no frames: the picture is all of them.
    """
    found = set()
    if getattr(image, "is_animated", False) and image.format != "PSD":
        found.add(FRAMES)
    if not image.mode.startswith("I") and _bits(image, raw) > 8:
        found.add(BITS)
    if image.format == "TIFF" and image.tag_v2.get(TiffImagePlugin.SAMPLESPERPIXEL, 1) > len(image.getbands()):
        found.add(BANDS)
    return found


def _bits(image: Image.Image, raw: bytes) -> int:
    """Return the bits a channel of a colour file; where its format is none of those with more than 8 that Pillow reads, 8."""
    match image.format:
        case "PNG":
            return raw[raw.find(b"IHDR") + 12]  # after the name, width and height
        case "TIFF":
            return max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
        case "PPM":
            args = image.tile[0].args  # (mode, largest value) where Pillow scales the values
            return args[1].bit_length() if isinstance(args, tuple) and image.tile[0].codec_name.startswith("ppm") else 8
        case "SGI":
            return 8 * raw[3]
        case "JPEG2000":
            return (raw[raw.find(b"\xff\x4f\xff\x51") + 2 + SIZ_TO_DEPTH] & 0x7F) + 1
        case "AVIF":
            return 10 if raw[raw.find(b"av1C") + AV1C_TO_DEPTH] & HIGH_BITDEPTH else 8
    return 8


def may_be_transparent(mode: str, info: dict) -> bool:
    """Return whether an image of a mode of Pillow's, with its `info`, may have pixels that are not opaque."""
    return mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in info


def is_transparent(image: Image.Image) -> bool:
    """Return whether a decoded image has a pixel that is not opaque."""
    if not may_be_transparent(image.mode, image.info):
        return False
    if image.mode.startswith("I"):  # the transparent value, of 16 bits
        return bool(np.any(np.asarray(image) == image.info["transparency"]))
    last = image.getbands()[-1]
    alpha = image.getchannel(last) if last in "Aa" else image.convert("RGBA").getchannel("A")
    return alpha.getextrema()[0] < 255
