"""Both loaders show the true picture: of CMYK with and without a marker, white zeros, alpha, any byte order, any turn."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastjepa.data.decode_dali import DaliSettings, Encoded, _decoded, dali_reads
from fastjepa.data.decode_pillow import UPRIGHT, decode_image, read_header
from fastjepa.data.sources import open_source
from fastjepa.loader.loader import batch_recipe
from fastjepa.loader.micro_batches import EncodedBatches
from tests.support.batches import CPU, settings
from tests.support.images import Tiff, encode_png, save_image

HEIGHT, WIDTH = 48, 64
Y, X = np.mgrid[0:HEIGHT, 0:WIDTH]
SMOOTH = np.stack([128 + 100 * np.sin(X / 19), 128 + 90 * np.cos(Y / 13), 40 + 2.5 * X], -1).round().astype(np.uint8)
PICTURE, GREY = Image.fromarray(SMOOTH), Image.fromarray(SMOOTH).convert("L")
VALUES = np.array(GREY).astype(np.int64)
ALPHA = np.where(X > 40, 0, 4 * X).astype(np.uint8)
CLEAR = Image.fromarray(np.dstack([SMOOTH, ALPHA]))
APP0, ADOBE = b"\xe0", b"\xee"


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}) | options)
    return stream.getvalue()


def marked(jpeg: bytes, first: bytes = b"") -> bytes:
    """A JPEG with another first segment in place of those of JFIF and Adobe."""
    place, kept = 2, jpeg[:2] + first
    while jpeg[place + 1] != 0xDA:  # its scan
        end = place + 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
        kept += b"" if jpeg[place + 1] in APP0 + ADOBE else jpeg[place:end]
        place = end
    return kept + jpeg[place:]


def adobe(transform: int) -> bytes:
    """Adobe's segment: 0 says RGB or CMYK, 1 YCbCr, 2 YCCK."""
    return b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def as_ycck(image: Image.Image) -> Image.Image:
    """CMYK that Pillow stores as Adobe's YCCK: the inks, which are the negative, as Y, Cb and Cr; and no black."""
    inks = [ImageOps.invert(band) for band in ImageOps.invert(image).convert("YCbCr").split()]
    return Image.merge("CMYK", [*inks, Image.new("L", image.size, 0)])


CMYK, PALETTE = PICTURE.convert("CMYK"), PICTURE.quantize(64)
COLOUR = {
    "cmyk": encode(CMYK),
    "cmyk without a marker": marked(encode(CMYK)),
    "cmyk without a marker, progressive": marked(encode(CMYK, progressive=True)),
    "ycck": marked(encode(as_ycck(PICTURE)), adobe(2)),
    "jpeg": encode(PICTURE),
    "jpeg without a marker": marked(encode(PICTURE)),  # as cameras write it
    "jpeg of adobe": marked(encode(PICTURE), adobe(1)),
    "rgb": encode(PICTURE, keep_rgb=True),
    "rgb without a marker": marked(encode(PICTURE, keep_rgb=True)),
    "cmyk tiff": encode(CMYK, "TIFF"),
    "16-bit rgb png": encode_png(SMOOTH.astype(np.uint16) * 257),
    "16-bit tiff": Tiff(16, 2, ">").encode(SMOOTH.astype(np.int64) * 257),
    "rgba png": encode(CLEAR, "PNG"),
    "rgba webp": encode(CLEAR, "WEBP", lossless=True, exact=True),
    "rgba tiff": encode(CLEAR, "TIFF"),
    "rgb and a key": encode(PICTURE, "PNG", transparency=tuple(SMOOTH[0, 0].tolist())),
    "a fourth band": Tiff(8, 2, extra=(0,)).encode(np.dstack([SMOOTH, ALPHA])),
}
LEVELS = {
    "grey jpeg": encode(GREY, subsampling=-1),
    "grey jpeg of adobe": marked(encode(GREY, subsampling=-1), adobe(0)),
    "la png": encode(Image.merge("LA", [GREY, Image.fromarray(ALPHA)]), "PNG"),
    "16-bit png": encode_png((VALUES * 257).astype(np.uint16)),
    "16-bit la png": encode_png(np.dstack([VALUES * 257, ALPHA]).astype(np.uint16)),
    **{f"16-bit tiff {order}": Tiff(16, 1, order).encode(VALUES * 257) for order in "<>"},
    **{f"16-bit tiff {order} of white zeros": Tiff(16, 0, order).encode(65535 - VALUES * 257) for order in "<>"},
    "8-bit tiff of white zeros": Tiff(8, 0).encode(255 - VALUES),
}
PALETTES = {
    "palette": encode(PALETTE, "PNG"),
    "palette with alpha": encode(PALETTE, "PNG", transparency=bytes(range(64))),
    "palette with a clear entry": encode(PALETTE, "PNG", transparency=3),
    "gif": encode(PALETTE, "GIF", transparency=3),
}


def through_dali(raw: bytes, channels: int) -> torch.Tensor:
    """The whole picture as the loader of DALI hands it over: by DALI's own decoder, or as pixels."""
    view = BATCHES[channels]._file(raw, lambda height, width: ((0, 0, height, width), False), first=False).image
    settings = DaliSettings(1, channels, view.box[2:], CPU, threads=1, ahead=0, hw_decoder_load=0.0)
    return _decoded(Encoded.of([view]), settings)[0]


BATCHES: dict[int, EncodedBatches] = {}


@pytest.fixture(autouse=True, scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save_image(tmp_path_factory.mktemp("images") / "0.png", seed=0).parent
    for channels in (1, 3):
        setting = settings(folder, batch_size=1, loader="dali", channels=channels)
        BATCHES[channels] = EncodedBatches(batch_recipe(setting), open_source(folder), 0, 1)


def off(image: torch.Tensor, true: Image.Image) -> float:
    """Mean difference of 255 from the true picture."""
    expected = np.array(true.convert("L" if len(image) == 1 else "RGB")).reshape(*true.size[::-1], -1)
    return float((image.permute(1, 2, 0).int() - torch.from_numpy(expected).int()).abs().float().mean())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*COLOUR, *LEVELS, *PALETTES])
def test_both_loaders_show_the_true_picture(name: str, channels: int):
    """A negative would be 60 and more of 255 away, JPEG is 3 at most."""
    raw = (COLOUR | LEVELS | PALETTES)[name]
    true = GREY if name in LEVELS else PICTURE if name in COLOUR else PALETTE.convert("RGB")
    ours, theirs = through_dali(raw, channels), decode_image(raw, channels)
    assert (ours.int() - theirs.int()).abs().max() <= (channels == 1)  # luminance may round otherwise
    assert off(theirs, true) < 3


ORIENTED = {
    "jpeg": lambda exif: encode(PICTURE, exif=exif),
    "grey jpeg": lambda exif: encode(GREY, subsampling=-1, exif=exif),
    "cmyk": lambda exif: encode(CMYK, exif=exif),
    "png": lambda exif: encode(PICTURE, "PNG", exif=exif),
    "webp": lambda exif: encode(PICTURE, "WEBP", lossless=True, exif=exif),
    "tiff": lambda exif: encode(PICTURE, "TIFF", exif=exif),
    "16-bit tiff of white zeros": lambda exif: Tiff(16, 0, orientation=exif[0x0112]).encode(65535 - VALUES * 257),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ORIENTED)
def test_both_loaders_turn_it_upright(name: str, orientation: int):
    raw, true = ORIENTED[name](turned(orientation)), GREY if "grey" in name or "16" in name else PICTURE
    ours, theirs = through_dali(raw, 3), decode_image(raw, 3)
    assert torch.equal(ours, theirs)
    assert off(theirs, true.transpose(UPRIGHT[orientation]) if orientation > 1 else true) < 3


@pytest.mark.parametrize("name", [name for name in COLOUR if "cmyk" in name or "rgb" in name[:3] or name == "ycck"])
def test_what_only_some_decoders_read_truly_is_pillows(name: str):
    """DALI shows the negative of CMYK without a marker; nobody here saw RGB on a GPU."""
    rgba = name in ("rgba png", "rgba webp", "rgb and a key")
    assert dali_reads(read_header(COLOUR[name]), COLOUR[name]) == rgba
