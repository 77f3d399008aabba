"""Bands of TIFF, PNG and NumPy files in full depth, in whatever layout they are stored."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from fastjepa.data.decode_arrays import bands_first, decode_bands
from fastjepa.data.decode_pillow import MAX_PIXELS, UPRIGHT, DecodeError, decode_image
from fastjepa.data.dropped import FRAMES, STATED_NODATA
from fastjepa.errors import UserError
from tests.support.arrays import LAYOUTS, measured, npy, paged_tiff, tiff
from tests.support.images import Tiff, encode_png

DTYPES = ["uint8", "uint16", "int16", "uint32", "float16", "float32", "float64"]


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bands", [1, 4, 12])
def test_the_bands_of_a_tiff_in_any_layout(layout: str, bands: int):
    values = measured(bands, 33, 21)
    found = decode_bands(tiff(values, layout))
    assert found.values.dtype == np.uint16 and np.array_equal(found.values, values) and not found.dropped
    assert str(found) == {1: "1 band of uint16", 4: "4 bands of uint16", 12: "12 bands of uint16"}[bands]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_keep_their_dtype(dtype: str):
    values = measured(3, 20, 24, dtype=dtype)
    for raw in (tiff(values, "planar"), npy(values), npy(values.astype(np.dtype(dtype).newbyteorder(">"))), npz(image=values)):
        found = decode_bands(raw, 3)
        assert np.array_equal(found.values, values) and str(found) == f"3 bands of {dtype}"


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_tiffs_of_another_writer(order: str, bits: int):
    """Bits that fill no byte, and zeros that are white."""
    values = np.random.default_rng(0).integers(0, 2**bits, (6, 9), dtype=np.uint16)
    assert np.array_equal(decode_bands(Tiff(bits, 1, order).encode(values)).values[0], values)
    assert np.array_equal(decode_bands(Tiff(bits, 0, order).encode(values)).values[0], 2**bits - 1 - values)
    five = np.random.default_rng(1).integers(0, 256, (6, 9, 5), dtype=np.uint8)
    assert np.array_equal(decode_bands(Tiff(8, 2, order, extra=(0, 0)).encode(five)).values, five.transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", [1, *UPRIGHT, 9])
def test_an_image_is_turned_upright(orientation: int):
    values = measured(7, 11, dtype="uint8")
    turn, image = UPRIGHT.get(orientation), Image.fromarray(values)
    expected = np.array(image if turn is None else image.transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    for raw in (Tiff(8, orientation=orientation).encode(values), stream.getvalue()):
        assert np.array_equal(decode_bands(raw).values[0], expected)


def test_the_first_page_or_the_bands_of_all():
    values = measured(5, 12, 10)
    first, every = decode_bands(paged_tiff(values)), decode_bands(paged_tiff(values), pages="bands")
    assert np.array_equal(first.values, values[:1]) and first.dropped == {FRAMES} and first.pages == 5
    assert np.array_equal(every.values, values) and not every.dropped
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as file:
        for page in (values[0], values[1, :6]):
            file.write(page, photometric="minisblack", contiguous=False)
    with pytest.raises(DecodeError, match="its pages differ in size or dtype"):
        decode_bands(stream.getvalue(), pages="bands")


def test_smaller_copies_and_masks_are_no_pages():
    """As in a cloud-optimised GeoTIFF."""
    values, stream = measured(16, 16), io.BytesIO()
    with tifffile.TiffWriter(stream) as file:
        file.write(values, photometric="minisblack", metadata=None)
        file.write(values[::2, ::2], photometric="minisblack", subfiletype=1, metadata=None)
        file.write(values > 9, photometric="minisblack", subfiletype=4, metadata=None)
    for pages in ("first", "bands"):
        found = decode_bands(stream.getvalue(), pages=pages)
        assert np.array_equal(found.values, values[None]) and not found.dropped and found.pages == 1


def test_a_no_data_value_in_the_tags_is_told():
    found = decode_bands(tiff(measured(2, 8, 8), "planar", extratags=[(42113, "s", 0, "-9999", True)]))
    assert found.dropped == {STATED_NODATA}


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_png_keeps_all_its_bits(dtype: str, bands: int):
    values = measured(13, 9, bands, dtype=dtype)
    assert np.array_equal(decode_bands(encode_png(values[:, :, 0] if bands == 1 else values)).values, values.transpose(2, 0, 1))


def test_other_pictures_come_as_pillow_makes_them():
    stream = io.BytesIO()
    Image.fromarray(measured(20, 30, 3, dtype="uint8")).save(stream, "JPEG")
    assert np.array_equal(decode_bands(stream.getvalue()).values, decode_image(stream.getvalue(), 3).numpy())
    grey = measured(5, 4, dtype="uint8")
    assert np.array_equal(decode_bands(grey).values, grey[None])


@pytest.mark.parametrize(
    "shape, count, first",
    [
        ((64, 32), 1, None),
        ((12, 64, 32), 12, True),
        ((64, 32, 12), 12, False),
        ((200, 64, 64), 200, True),
        ((64, 64, 200), 200, False),
        ((12, 12, 13), 13, False),
        ((12, 12, 13), None, True),
        ((12, 64, 32), None, True),
        ((64, 32, 12), None, False),
    ],
)
def test_the_bands_of_an_array_are_its_first_or_last_axis(shape, count, first):
    array = measured(*shape)
    expected = array[None] if first is None else array if first else array.transpose(2, 0, 1)
    for stored in (array, np.asfortranarray(array)):
        found = decode_bands(npy(stored), count).values
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "shape, count, says",
    [
        ((12, 64, 12), 12, "has bands first or last, nobody knows"),
        ((8, 64, 8), None, "has bands first or last, nobody knows"),
        ((10, 64, 32), 12, "has no axis of 12 bands, first or last; set data.channels"),
        ((7,), 1, "is no image; save it as"),
        ((2, 3, 4, 5), 3, "is no image; save it as"),
    ],
)
def test_an_array_that_may_be_anything_is_refused(shape, count, says):
    with pytest.raises(DecodeError, match=rf"^an array of shape \({shape[0]}, .*{says}|^an array of shape \(7,\) {says}"):
        bands_first(np.zeros(shape), count)


def test_an_npz_holds_one_array_or_one_named_image():
    image, other = measured(3, 8, 9), measured(2, 2)
    for raw in (npz(image=image), npz(anything=image), npz(image=image, label=other)):
        assert np.array_equal(decode_bands(raw, 3).values, image)
    with pytest.raises(DecodeError, match=r"holds the arrays a.npy, b.npy, and none is named image; name the one to take so"):
        decode_bands(npz(a=image, b=other))


REFUSED = {
    "objects": (npy(np.array([[None, 1]], dtype=object)), "holds Python objects"),
    "words": (npy(np.array([["a", "b"]])), "of <U1, which are no real numbers"),
    "complex numbers": (npy(np.zeros((4, 4), complex)), "of complex128, which are no real numbers"),
    "a palette": (
        tiff(measured(1, 8, 8, dtype="uint8"), photometric="palette", colormap=measured(3, 256)),
        "numbers of a palette's colours",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_measurement_is_refused(kind: str):
    raw, says = REFUSED[kind]
    with pytest.raises(DecodeError, match=says):
        decode_bands(raw)


def test_an_image_too_large_is_refused_by_its_header():
    wide = MAX_PIXELS // 2 + 1
    header = npy(np.zeros((2, 0), np.uint8)).replace(
        b"(2, 0), }" + b" " * 10, b"(2, %d), }" % wide + b" " * (11 - len(str(wide)))
    )
    for raw in (header, encode_png(np.zeros((1, 1), np.uint8)).replace(b"IHDR\0\0\0\1\0\0\0\1", b"IHDR\0\xff\0\0\0\0\xff\0")):
        with pytest.raises(DecodeError, match=f"pixels are more than {MAX_PIXELS}; tile the image"):
            decode_bands(raw)


WHOLE = {
    "tiff": tiff(measured(4, 40, 30)),
    "planar tiff": tiff(measured(4, 40, 30), "planar"),
    "lzw tiff": tiff(measured(4, 40, 30), "lzw"),
    "pages": paged_tiff(measured(3, 40, 30)),
    "png": encode_png(measured(40, 30, 3)),
    "npy": npy(measured(4, 40, 30)),
    "npz": npz(image=measured(4, 40, 30)),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_cut_or_spoilt_file_is_damaged(kind: str):
    """Cut anywhere, or with bytes of its beginning turned: it is refused, or a value differs, and nothing else is raised."""
    raw = WHOLE[kind]
    whole = decode_bands(raw, pages="bands").values
    for eighths in range(8):
        with pytest.raises(DecodeError):
            decode_bands(raw[: len(raw) * eighths // 8], pages="bands")
    for place in range(0, 200, 3):
        spoilt = raw[:place] + bytes([raw[place] ^ 0x55]) + raw[place + 1 :]
        try:
            found = decode_bands(spoilt, pages="bands").values
        except DecodeError:
            continue
        assert found.ndim == 3 and found.size <= 64 * whole.size


@pytest.mark.parametrize("library", ["tifffile", "imagecodecs"])
@pytest.mark.parametrize("kind", ["tiff", "png"])
def test_a_missing_library_is_one_sentence(library: str, kind: str, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=r"need tifffile and imagecodecs .*; run: pip install 'fastjepa\[tiff\]'$"):
        decode_bands(WHOLE[kind])
    assert decode_bands(WHOLE["npy"]).values.shape == (4, 40, 30)


def test_an_npy_of_a_folder_is_mapped_not_read(tmp_path: Path):
    """Values written into the image are not written into the file."""
    import mmap

    from fastjepa.data.image_folder import ImageFolder

    values = measured(3, 64, 48)
    (tmp_path / "0.npy").write_bytes(npy(values))
    raw = ImageFolder(tmp_path).read(0)
    found = decode_bands(raw).values
    assert isinstance(raw, mmap.mmap) and np.array_equal(found, values)
    assert found.flags.writeable and not found.flags.owndata
    found[:] = 0
    assert np.array_equal(np.load(tmp_path / "0.npy"), values)
