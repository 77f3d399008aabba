"""Whatever a file holds beside its image is told and counted: by `data check`, and in a run by both loaders."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastjepa.cli.main import main
from fastjepa.data.decode_pillow import DecodeError, decode_file, decode_image
from fastjepa.data.dropped import ALPHA, BANDS, BITS, FRAMES, NARROW
from tests.support.batches import load, settings
from tests.support.images import Tiff, encode_png, png_chunk

RANDOM = np.random.default_rng(0)
DEEP, DEEP_RGB = RANDOM.integers(0, 65536, (24, 30)).astype(np.uint16), RANDOM.integers(0, 65536, (24, 30, 3)).astype(np.uint16)
GREY, RGB = (DEEP >> 8).astype(np.uint8), (DEEP_RGB >> 8).astype(np.uint8)
FOUR, FIVE = np.dstack([RGB, GREY]), np.dstack([RGB, GREY, GREY])
PICTURE, TWO, OTHERS = Image.fromarray(RGB), np.dstack([GREY, GREY]), [Image.fromarray(RGB // part) for part in (2, 3)]
CLEAR, OPAQUE = Image.fromarray(FOUR), PICTURE.convert("RGBA")
PALETTE = Image.fromarray(GREY // 64, "P")
PALETTE.putpalette(RANDOM.integers(0, 256, 768).tolist())


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def flagged(avif: bytes) -> bytes:
    """The same file, whose header says 10 bits in both of its places."""
    place, flagged = avif.index(b"av1C") + 6, bytearray(avif)
    flagged[place] |= 0x40
    return bytes(flagged).replace(b"\x03\x08\x08\x08", b"\x03\x0a\x0a\x0a")


MOVING = {kind: encode(PICTURE, kind, save_all=True, append_images=OTHERS) for kind in ("GIF", "WEBP", "PNG", "MPO", "AVIF")}
DROPPED = {f"moving {kind}": (raw, {FRAMES}) for kind, raw in MOVING.items()} | {
    "moving png, its first frame apart": (encode(PICTURE, save_all=True, append_images=OTHERS, default_image=True), {FRAMES}),
    "12 pages": (Tiff(pages=12).encode(GREY), {FRAMES}),
    "12 pages of 16 bits": (Tiff(16, pages=12).encode(DEEP), {FRAMES, BITS}),
    "12 bits in a 16-bit png": (encode_png(DEEP >> 4), {NARROW}),
    "12 bits in a 16-bit tiff": (Tiff(16).encode(DEEP >> 4), {NARROW}),
    "16-bit png": (encode_png(DEEP), {BITS}),
    "16-bit rgb png": (encode_png(DEEP_RGB), {BITS}),
    "16-bit grey and alpha png": (encode_png(np.dstack([DEEP, DEEP])), {BITS, ALPHA}),
    "16-bit tiff, big-endian": (Tiff(16, order=">").encode(DEEP), {BITS}),
    "16-bit rgb tiff": (Tiff(16, 2).encode(DEEP_RGB), {BITS}),
    "12-bit tiff": (Tiff(12).encode(DEEP >> 4), {BITS}),
    "32-bit tiff of 16 bits": (Tiff(32).encode(DEEP), {BITS}),
    "16-bit ppm": (b"P6 30 24 65535\n" + DEEP_RGB.astype(">u2").tobytes(), {BITS}),
    "12-bit pgm": (b"P5 30 24 4095\n" + (DEEP >> 4).astype(">u2").tobytes(), {BITS}),
    "16-bit jp2": (encode(Image.fromarray(DEEP), "JPEG2000"), {BITS}),
    "10-bit avif": (flagged(encode(PICTURE, "AVIF")), {BITS}),
    "a fourth band": (Tiff(8, 2, extra=(0,)).encode(FOUR), {BANDS}),
    "five bands": (Tiff(8, 2, extra=(0, 0)).encode(FIVE), {BANDS}),
    "alpha and a fifth band": (Tiff(8, 2, extra=(2, 0)).encode(FIVE), {BANDS, ALPHA}),
    "cmyk and a fifth band": (Tiff(8, 5, extra=(0,)).encode(FIVE), {BANDS}),
    "grey and a second band": (Tiff(8, extra=(0,)).encode(TWO), {BANDS}),
    "alpha of a tiff": (Tiff(8, 2, extra=(2,)).encode(FOUR), {ALPHA}),
    "alpha multiplied in": (Tiff(8, 1, extra=(1,)).encode(TWO), {ALPHA}),
    "alpha of a png": (encode(CLEAR), {ALPHA}),
    "alpha of a webp": (encode(CLEAR, "WEBP", lossless=True), {ALPHA}),
    "grey and alpha": (encode(CLEAR.convert("LA")), {ALPHA}),
    "a transparent colour": (encode(PICTURE, transparency=tuple(RGB[3, 3].tolist())), {ALPHA}),
    "a transparent grey": (encode(Image.fromarray(GREY), transparency=int(GREY[3, 3])), {ALPHA}),
    "a transparent 16-bit grey": (encode_png(DEEP, png_chunk(b"tRNS", struct.pack(">H", DEEP[3, 3]))), {ALPHA, BITS}),
    "a palette's transparent entry": (encode(PALETTE, transparency=1), {ALPHA}),
    "a palette's alpha": (encode(PALETTE, transparency=b"\xff\x80"), {ALPHA}),
    "a gif's transparent entry": (encode(PALETTE, "GIF", transparency=1), {ALPHA}),
}
WHOLE = {
    "jpeg": encode(PICTURE, "JPEG"),
    "cmyk": encode(PICTURE.convert("CMYK"), "JPEG"),
    "png": encode(PICTURE),
    "8 bits in a 16-bit png": encode_png(GREY.astype(np.uint16) * 257),
    "opaque png": encode(OPAQUE),
    "opaque webp": encode(OPAQUE, "WEBP", lossless=True),
    "opaque palette": encode(PALETTE, transparency=b"\xff" * 4),
    "an entry that no pixel has": encode(PALETTE, transparency=9),
    "one page": Tiff().encode(GREY),
    "white zeros": Tiff(8, 0).encode(GREY),
    "a still gif": encode(PICTURE, "GIF", save_all=True),
    "ppm": encode(PICTURE, "PPM"),
    "pbm": encode(PICTURE.convert("1"), "PPM"),
    "sgi": encode(PICTURE, "SGI"),
    "jp2": encode(PICTURE, "JPEG2000"),
    "avif": encode(PICTURE, "AVIF"),
    "ico": encode(PICTURE, "ICO"),  # of several sizes, the largest
}


@pytest.mark.parametrize("name", [*DROPPED, *WHOLE])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_a_file_holds_beside_its_image(name: str, channels: int):
    raw, kinds = DROPPED[name] if name in DROPPED else (WHOLE[name], set())
    assert decode_file(raw, channels).dropped == kinds


def test_17_levels_are_kept_of_12_bits_in_16():
    assert len(np.unique(decode_image(encode_png(DEEP >> 4), 1))) == 17
    assert len(np.unique(decode_image(Tiff(12).encode(DEEP >> 4), 1))) > 200


UNKNOWN_RANGE = {
    "floating-point": Tiff(32, sample_format=3).encode(DEEP / 65535),
    "32-bit": Tiff(32).encode(DEEP.astype(np.int64) * 9),
    "signed": Tiff(16, sample_format=2).encode(DEEP.astype(int) - 32768),
    "signed 8-bit": Tiff(8, sample_format=2).encode(GREY.astype(int) - 128),
}


@pytest.mark.parametrize("kind", UNKNOWN_RANGE)
def test_values_without_a_known_range_are_refused(kind: str):
    with pytest.raises(DecodeError, match=f"^{kind.split()[0]} pixels have no known range; save them as 8 or 16 bits, or"):
        decode_image(UNKNOWN_RANGE[kind], 1)


COUNTS = {FRAMES: 3, BITS: 2, ALPHA: 2, BANDS: 1}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Twelve files, of which seven hold more than their image."""
    names = [
        "moving GIF",
        "moving WEBP",
        "12 pages of 16 bits",
        "16-bit png",
        "alpha of a png",
        "alpha of a webp",
        "five bands",
    ]
    (tmp_path / "in").mkdir()
    for name in names + ["jpeg", "png", "opaque png", "opaque webp", "one page"]:
        (tmp_path / "in" / f"{name}.png").write_bytes(DROPPED[name][0] if name in DROPPED else WHOLE[name])
    return tmp_path / "in"


def test_data_check_counts_them_and_exits_with_0(mixed: Path, capsys):
    assert main(["data", "check", str(mixed), "--workers", "2"]) == 0
    *_, bad, frames, bits, alpha, bands = capsys.readouterr().out.splitlines()
    assert bad == "bad: 0" and frames == f"left out: 3 images hold {FRAMES}" and bands == f"left out: 1 images hold {BANDS}"
    assert {bits, alpha} == {f"left out: 2 images hold {kind}" for kind in (BITS, ALPHA)}
    assert main(["data", "check", str(mixed), "--json", "--workers", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == COUNTS


@pytest.mark.parametrize("loader", ["torch", "dali"])
@pytest.mark.parametrize("workers, steps", [(0, 3), (2, 6)])
def test_a_run_names_the_first_of_each_kind_and_counts_the_files(mixed: Path, loader: str, workers: int, steps: int, caplog):
    """Once, though in the second epoch they are met again."""
    load(settings(mixed, loader=loader, num_workers=workers), range(steps))
    said = [record.getMessage() for record in caplog.records]
    totals = {f"{count} of the 12 files that this rank read in the first epoch hold {kind}" for kind, count in COUNTS.items()}
    assert {line for line in said if line[0].isdigit()} == totals and len(said) == 2 * len(COUNTS)
    for kind in COUNTS:
        (line,) = [line for line in said if line.endswith(f": holds {kind}; such files are counted in the first epoch")]
        assert Path(line.partition(": holds")[0]).parent == mixed


def test_a_run_that_ends_early_says_what_it_counted(mixed: Path, caplog):
    load(settings(mixed), range(1), stop=1)
    assert any("of the 4 files that this rank read in the first epoch hold" in record.getMessage() for record in caplog.records)
