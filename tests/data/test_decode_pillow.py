"""Pixels of every kind of file; crop boxes and crops equal to torchvision's."""

import io
import math
import re
import struct
import zlib
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2.functional import resized_crop

from fastjepa.data import decode_pillow
from fastjepa.data.crops import crop_box, crop_image
from fastjepa.data.decode_pillow import PNG_SIGNATURE, DecodeError, decode_image, read_header, stored_size
from tests.support.images import Tiff


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


class GivenNumbers:
    """Stand in for what RandomResizedCrop.get_params uses of torch, in float64, with given uniform numbers: four a try."""

    log, exp = staticmethod(torch.log), staticmethod(torch.exp)

    def __init__(self, uniforms: list[float]):
        self.uniforms, self.reals, self.integers = uniforms, 0, 0

    def tensor(self, values):
        return torch.tensor(values, dtype=torch.float64)

    def empty(self, _):
        return self

    def uniform_(self, low, high):
        number = self.uniforms[4 * (self.reals // 2) + self.reals % 2]
        self.reals += 1
        return torch.as_tensor(low + (high - low) * number, dtype=torch.float64)

    def randint(self, low, high, size):
        number = self.uniforms[4 * (self.reals // 2 - 1) + 2 + self.integers]
        self.integers += 1
        return torch.tensor([low + math.floor((high - low) * number)])


unit = st.floats(0, 1, exclude_max=True)


@given(st.integers(1, 700), st.integers(1, 700), st.tuples(unit, unit), st.lists(unit, min_size=40, max_size=40))
def test_crop_box_is_torchvisions(height, width, bounds, uniforms):
    scale = (max(min(bounds), 1e-3), max(*bounds, 1e-3))
    with mock.patch("torchvision.transforms.transforms.torch", GivenNumbers(uniforms)):
        theirs = torchvision.transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), scale, [3 / 4, 4 / 3])
    assert crop_box(height, width, scale, uniforms) == theirs


def test_crop_box_falls_back_to_the_centre():
    """A whole panorama never has an allowed aspect: ten tries fail, and the widest central box remains."""
    assert crop_box(30, 300, (1.0, 1.0), [0.5] * 40) == (0, 130, 30, 40)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "box, size",
    [
        ((3, 5, 60, 70), (32, 32)),
        ((0, 0, 90, 120), (224, 160)),
        ((10, 20, 32, 24), (32, 24)),
        ((89, 119, 1, 1), (16, 16)),
        ((0, 0, 90, 120), (7, 5)),
    ],
)
def test_crop_is_torchvisions(channels, box, size):
    """From one channel, from RGB as decoded (channels last) and from contiguous RGB."""
    pixels = noise(90, 120) if channels == 1 else noise(90, 120, 3)
    for image in (decode_image(pixels, channels), decode_image(pixels, channels).contiguous()):
        ours = crop_image(image, box, size)
        assert torch.equal(ours, resized_crop(image, *box, list(size), antialias=True))
        assert torch.equal(crop_image(image, box, size, flip=True), ours.flip(-1))


def test_grey_as_three_channels_is_cropped_like_its_copies():
    grey = decode_image(noise(28, 28), 3)
    assert torch.equal(crop_image(grey, (2, 3, 20, 22), (28, 28)), crop_image(grey.contiguous(), (2, 3, 20, 22), (28, 28)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
def test_every_mode_becomes_grey_or_rgb(mode: str, channels: int):
    image = Image.fromarray(noise(20, 30, 3)).convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    expected = np.array(Image.open(io.BytesIO(encode(image, kind))).convert("L" if channels == 1 else "RGB"))
    decoded = decode_image(encode(image, kind), channels)
    assert decoded.shape == (channels, 20, 30) and decoded.dtype == torch.uint8
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), expected.reshape(20, 30, channels))


def test_cmyk_jpeg_keeps_its_colours():
    """Adobe's CMYK JPEGs store inverted ink; a red square stays red."""
    jpeg = encode(Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK"), "JPEG")
    red, green, blue = decode_image(jpeg, 3).float().mean((1, 2)).tolist()
    assert red > 240 and green < 15 and blue < 15


def outcome(read: Callable[[bytes], np.ndarray], raw: bytes) -> bytes:
    """The pixels that come of a file, as bytes; empty where it is refused."""
    try:
        return read(raw).tobytes()
    except (DecodeError, OSError, SyntaxError, ValueError):
        return b""


def by_pillow(raw: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(raw)) as image:
        return np.array(image.convert("RGB"))


def by_us(raw: bytes) -> np.ndarray:
    return decode_image(raw, 3).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
def test_a_jpeg_has_pillows_pixels(mode: str, subsampling: str):
    """Whatever its quality, its scans and its restarts; sides that no block divides, and one pixel."""
    for height, width in ((33, 50), (1, 1), (8, 17)):
        image = Image.fromarray(noise(height, width, 3)).convert(mode)
        for options in ({"quality": 100}, {"quality": 30, "progressive": True}, {"restart_marker_blocks": 1}):
            jpeg = encode(image, "JPEG", subsampling=subsampling, **options)
            assert np.array_equal(by_us(jpeg), by_pillow(jpeg))
            assert np.array_equal(decode_image(jpeg, 1)[0].numpy(), np.array(Image.open(io.BytesIO(jpeg)).convert("L")))


@pytest.mark.parametrize("fault", ["cut", "changed", "left out"])
def test_a_damaged_jpeg_is_read_or_refused_as_by_pillow(fault: str):
    image, random = Image.fromarray(noise(40, 56, 3)), np.random.default_rng(0)
    jpegs, outcomes = [encode(image, "JPEG", progressive=progressive) for progressive in (False, True)], set()
    for trial in range(200):
        jpeg = bytearray(jpegs[trial % 2])
        start = int(random.integers(2, len(jpeg)))
        length = {"cut": len(jpeg), "changed": 1, "left out": int(random.integers(1, 40))}[fault]
        jpeg[start : start + length] = random.bytes(1) if fault == "changed" else b""
        assert outcome(by_us, jpeg) == outcome(by_pillow, jpeg)
        outcomes.add(outcome(by_us, jpeg) != b"")
    assert outcomes == ({False} if fault == "cut" else {False, True})


def test_palette_with_transparent_entries_keeps_its_colours():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert decode_image(encode(image, transparency=b"\x00\x80"), 3)[:, 0, 0].tolist() == [200, 100, 50]


def test_exif_rotation_is_applied():
    pixels = noise(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    decoded = decode_image(encode(Image.fromarray(pixels), exif=exif), 1)
    assert np.array_equal(decoded[0].numpy(), np.rot90(pixels, k=-1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(kind: str):
    """Rounded x * 255 / 65535: not clipped at 255, not the high byte."""
    values = np.array([[0, 128, 129, 255, 256], [32767, 32768, 65407, 65406, 65535]], dtype=np.uint16)
    decoded = decode_image(encode(Image.fromarray(values), kind), 1)
    assert np.array_equal(decoded[0].numpy(), np.round(values * (255 / 65535)))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("width", [13, 16])
def test_a_tiff_of_any_depth_is_the_same_whether_its_zero_is_white_or_black(bits: int, order: str, zipped: bool, width: int):
    """Both ways to write a ramp from black to white, in the byte order of either kind of machine."""
    top = 2**bits - 1
    values = np.linspace(0, top, 9 * width).round().astype(np.int64).reshape(9, width)
    expected = np.round(values * 255 / top)
    black = decode_image(Tiff(bits, 1, order, zipped=zipped).encode(values), 1)
    white = decode_image(Tiff(bits, 0, order, zipped=zipped).encode(top - values), 1)
    assert np.array_equal(black[0].numpy(), expected) and torch.equal(white, black)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
@pytest.mark.parametrize("kind", ["TIFF", "IM"])
def test_16_bit_grey_of_either_byte_order_is_read(mode: str, kind: str):
    values = np.random.default_rng(0).integers(0, 65536, (5, 7))
    image = Image.frombytes(mode, (7, 5), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    assert np.array_equal(decode_image(encode(image, kind), 1)[0].numpy(), np.round(values / 257))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("photometric", [0, 1])
def test_16_bit_grey_is_turned_upright(orientation: int, photometric: int):
    values = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2570
    raw = Tiff(16, photometric, orientation=orientation).encode(values if photometric else 65535 - values)
    turn = decode_pillow.UPRIGHT.get(orientation)
    upright = Image.fromarray((values // 257).astype(np.uint8))
    assert np.array_equal(decode_image(raw, 1)[0].numpy(), np.array(upright.transpose(turn) if turn is not None else upright))


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_times_alpha_is_grey(channels: int):
    """Pillow turns its own mode for it into nothing but grey and alpha."""
    grey = noise(5, 7)
    raw = Tiff(8, 1, extra=(1,)).encode(np.dstack([grey, np.full_like(grey, 255)]))
    assert np.array_equal(decode_image(raw, channels)[0].numpy(), grey)


def test_arrays_need_no_decoding():
    grey, colour = noise(5, 6), noise(5, 6, 3)
    assert np.array_equal(decode_image(grey, 1).numpy(), grey[None])
    assert np.array_equal(decode_image(grey, 3).numpy(), np.stack([grey] * 3))
    assert np.array_equal(decode_image(colour, 3).numpy(), colour.transpose(2, 0, 1))
    assert np.array_equal(decode_image(colour, 1)[0].numpy(), np.array(Image.fromarray(colour).convert("L")))


JPEG = encode(Image.fromarray(noise(40, 40, 3)), "JPEG")
PNG = encode(Image.fromarray(noise(40, 40, 3)))


@pytest.mark.parametrize(
    "raw",
    [b"", b"no image", JPEG[:-300], JPEG[:20], PNG[:-600], PNG[:100] + b"\0\0\0\0" + PNG[104:]],
    ids=["empty", "text", "truncated jpeg", "jpeg header", "truncated png", "wrong checksum"],
)
def test_broken_files_raise(raw: bytes):
    with pytest.raises(DecodeError, match="not an image Pillow can read in full"):
        decode_image(raw, 3)


def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(decode_pillow, "MAX_PIXELS", 1599)
    with pytest.raises(DecodeError, match="40x40 pixels are more than 1599"):
        decode_image(PNG, 3)


def chunk(kind: bytes, content: bytes, checked: bool = True) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ (not checked))


PIXELS = noise(20, 30, 3)
LARGE = zlib.compress(bytes(2 << 20))  # 2 MiB in some bytes
PNG_METADATA = {
    "broken EXIF": chunk(b"eXIf", b"no TIFF at all"),
    "cut EXIF": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x09\x01\x12"),
    "empty EXIF": chunk(b"eXIf", b""),
    "EXIF in hexadecimal that is none": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  4\nzz\n"),
    "large profile": chunk(b"iCCP", b"icc\0\0" + LARGE),
    "damaged profile": chunk(b"iCCP", b"icc\0\0" + LARGE[:-9]),
    "profile of an unknown kind": chunk(b"iCCP", b"icc\0\x07" + LARGE),
    "large XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\x01\0\0\0" + LARGE),
    "large text": chunk(b"zTXt", b"Comment\0\0" + LARGE),
    "much text": b"".join(chunk(b"tEXt", b"Comment\0" + bytes(1 << 20)) for _ in range(70)),
    "text with a bad check sum": chunk(b"tEXt", b"Comment\0hello", checked=False),
    "time with a bad check sum": chunk(b"tIME", bytes(7), checked=False),
    "pHYs with a bad check sum": chunk(b"pHYs", bytes(9), checked=False),
    "short pHYs": chunk(b"pHYs", b"\0\0"),
    "empty pHYs": chunk(b"pHYs", b""),
    "short gAMA": chunk(b"gAMA", b"\0"),
    "short cHRM": chunk(b"cHRM", b"\0"),
    "empty sRGB": chunk(b"sRGB", b""),
    "short acTL": chunk(b"acTL", b"\0"),
    "short fcTL": chunk(b"fcTL", b"\0"),
}


@pytest.mark.parametrize("metadata", PNG_METADATA)
@pytest.mark.parametrize("behind", [False, True])
def test_a_png_is_taken_whatever_its_metadata(metadata: str, behind: bool):
    raw = encode(Image.fromarray(PIXELS))
    place = len(raw) - 12 if behind else 33  # before IEND, or after IHDR
    spoilt = raw[:place] + PNG_METADATA[metadata] + raw[place:]
    assert torch.equal(decode_image(spoilt, 3), torch.from_numpy(PIXELS).permute(2, 0, 1))
    header = read_header(spoilt)
    assert (header.height, header.width, header.orientation) == (20, 30, 1) and stored_size(spoilt) == (30, 20)


@pytest.mark.parametrize(
    "exif", [b"no TIFF at all", b"Exif\0\0", b"MM\0*\0\0\0\x08\0\x09\x01\x12", b"II*\0\xff\xff\xff\xff", b"\0" * 9]
)
@pytest.mark.parametrize("kind", ["WEBP", "JPEG"])
def test_a_webp_or_jpeg_with_broken_exif_is_taken(kind: str, exif: bytes):
    image = Image.fromarray(PIXELS)
    raw = encode(image, kind, exif=exif)
    assert torch.equal(decode_image(raw, 3), decode_image(encode(image, kind), 3))
    assert read_header(raw).orientation == 1


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (PNG_SIGNATURE + chunk(b"IHDR", bytes(13), checked=False), "PNG: broken PNG file"),
        (PNG_SIGNATURE + b"\0\0\0\x04tEXt", "PNG: "),
        (b"GIF89a", "GIF: "),
        (b"<html>not found", "begins with b'<html>no', as no format"),
        (encode(Image.fromarray(PIXELS))[:-300] + chunk(b"tEXt", b"a\0b", checked=False), "OSError: "),
    ],
)
def test_the_reason_of_a_refusal_is_said(raw: bytes, reason: str):
    with pytest.raises(DecodeError, match=re.escape("not an image Pillow can read in full (")) as refused:
        decode_image(raw, 3)
    assert reason in str(refused.value) and " at 0x" not in str(refused.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP"])
def test_a_jpeg_and_a_png_are_read_by_their_own_reader_alone(kind, monkeypatch):
    raw, asked = encode(Image.fromarray(noise(8, 8, 3)), kind), []
    opened = Image.open
    monkeypatch.setattr(Image, "open", lambda file, formats=None: asked.append(formats) or opened(file, formats=formats))
    assert decode_image(raw, 3).shape == (3, 8, 8)
    assert asked == [(kind,) if kind in ("JPEG", "PNG") else None]
