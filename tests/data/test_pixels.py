"""Pixels by the keys of a config: which bands, in which dtype and unit, and what is no measurement."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resized_crop

from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import Config
from fastjepa.data.crops import crop_image, fit_to
from fastjepa.data.decode_pillow import decode_file
from fastjepa.data.dropped import NODATA, ROUNDED
from fastjepa.data.pixels import Pixels, UnlikeError, normalise_pixels
from fastjepa.errors import ConfigError
from fastjepa.loader.loader import pixels_of
from tests.support.arrays import measured, npy, paged_tiff, tiff
from tests.support.images import encode_png

DEEP = measured(5, 12, 10)


def pixels(**keys) -> Pixels:
    return pixels_of(config(**keys))


def config(**keys) -> Config:
    return config_from_dict({"data": keys})


def test_bands_are_chosen_in_their_order():
    for raw in (tiff(DEEP), tiff(DEEP, "planar"), npy(DEEP)):
        assert np.array_equal(pixels(dtype="uint16", channels=5).decode(raw).image.numpy(), DEEP)
        assert np.array_equal(pixels(dtype="uint16", bands=[3, 2, 1]).decode(raw).image.numpy(), DEEP[[3, 2, 1]])
        assert np.array_equal(pixels(dtype="uint16", bands=[4, 4]).decode(raw).image.numpy(), DEEP[[4, 4]])
    assert np.array_equal(pixels(dtype="uint16", bands=[2, 0], pages="bands").decode(paged_tiff(DEEP)).image, DEEP[[2, 0]])
    assert pixels(dtype="uint16", bands=[3, 2, 1]).channels == config(bands=[3, 2, 1]).data.channels == 3


def test_colours_may_change_places():
    stream, colours = io.BytesIO(), measured(9, 8, 3, dtype="uint8")
    Image.fromarray(colours).save(stream, "PNG")
    assert np.array_equal(pixels(bands=[2, 1, 0]).decode(stream.getvalue()).image, colours.transpose(2, 0, 1)[::-1])


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_as_pillow_makes_them(channels: int):
    """Whatever the file holds; a .npy, which Pillow does not know, is taken as it is."""
    for raw in (encode_png(DEEP[0]), encode_png(DEEP[:3].transpose(1, 2, 0)), tiff(measured(1, 6, 6, dtype="uint8"))):
        ours, theirs = pixels(channels=channels).decode(raw), decode_file(raw, channels)
        assert torch.equal(ours.image, theirs.image) and ours.dropped == theirs.dropped
    stored = measured(channels, 7, 8, dtype="uint8")
    assert np.array_equal(pixels(channels=channels).decode(npy(stored)).image, stored)


@pytest.mark.parametrize(
    "keys, raw, says",
    [
        (
            {"channels": 4, "dtype": "uint16"},
            tiff(DEEP),
            "holds 5 bands of uint16, and data.channels is 4; set that to 5, choose",
        ),
        ({"bands": [0, 5], "dtype": "uint16"}, tiff(DEEP), "asks for band 5; ask for bands below 5, or remove the file"),
        ({"channels": 5}, tiff(DEEP), "holds 5 bands of uint16, and data.dtype is uint8; set that to uint16, or remove"),
        ({"channels": 5, "dtype": "uint16"}, tiff(DEEP.astype("int16")), "data.dtype is uint16; set that to float32"),
        (
            {"channels": 1, "dtype": "uint16"},
            encode_png(measured(4, 4, dtype="uint8")),
            "1 band of uint8, and data.dtype is uint16",
        ),
        ({}, npy(np.zeros((3, 8, 9))), "holds 3 bands of float64, and data.dtype is uint8; set that to float32"),
        ({"channels": 5, "dtype": "uint16"}, paged_tiff(DEEP), "set data.pages to bands for those of its 5 pages"),
    ],
)
def test_a_file_that_does_not_go_with_the_config_is_refused(keys, raw, says):
    with pytest.raises(UnlikeError, match=says):
        pixels(**keys).decode(raw)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float16", "float32", "float64", "int32"])
def test_float32_takes_every_number_and_says_what_it_rounds(dtype: str):
    values = measured(2, 9, 9, dtype=dtype)
    found = pixels(dtype="float32", channels=2).decode(npy(values))
    assert np.array_equal(found.image.numpy(), values.astype(np.float32)) and found.image.dtype == torch.float32
    assert found.dropped == ({ROUNDED} if dtype in ("float64", "int32") else set())
    few = (values % 100).astype(dtype) if values.dtype.kind in "iu" else np.round(values).astype(dtype)
    assert not pixels(dtype="float32", channels=2).decode(npy(few)).dropped


GAPS = np.array([[0, 0, 1, 1], [2, 3, 4, 5], [7, 8, 9, 0]])  # band, row, column of values without measurement


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -9999.0])
def test_no_measurement_is_filled_so_that_it_normalises_to_0(value: float):
    values = measured(2, 6, 10, dtype="float32")
    values[tuple(GAPS)] = value
    given = pixels(dtype="float32", channels=2, nodata=-9999, mean=[300, -5], std=[40, 2])
    image, dropped, _ = given.decode(npy(values))
    ready = given.ready(image).numpy()
    assert dropped == {NODATA} and np.all(ready[tuple(GAPS)] == 0)
    others = np.ones(values.shape, bool)
    others[tuple(GAPS)] = False
    expected = (values - np.float32([300, -5])[:, None, None]) / np.float32([40, 2])[:, None, None]
    assert np.array_equal(ready[others], expected[others]) and np.count_nonzero(~others) == 4
    assert not given.decode(npy(measured(2, 6, 10, dtype="float32"))).dropped


@pytest.mark.parametrize(
    "dtype, mean, scale", [("uint8", [0.3, 0.7], None), ("uint16", [1200.4, 900.5], 1), ("uint16", [0.1, 0.2], 10000)]
)
def test_whole_numbers_without_measurement_become_their_mean(dtype: str, mean: list[float], scale: float | None):
    values = measured(2, 6, 10, dtype=dtype)
    values[values == 7] = 8
    values[tuple(GAPS)] = 7
    given = pixels(dtype=dtype, channels=2, nodata=7, mean=mean, std=mean, scale=scale)
    image, dropped, _ = given.decode(tiff(values, "planar"))
    filled = np.round(np.array(mean) * (scale or 255)).astype(dtype)
    assert dropped == {NODATA} and np.array_equal(image.numpy()[tuple(GAPS)], filled[GAPS[0]])
    assert torch.equal(given.ready(image), image)
    nearly = normalise_pixels(image, given.mean_std).numpy()[tuple(GAPS)]
    assert np.all(abs(nearly) <= 0.51 / (np.array(mean) * (scale or 255))[GAPS[0]])


def test_units_are_those_that_the_config_says():
    """The same statistics three times: of counts from 0 to 1, of the file's values, and of reflectances."""
    found = [
        config(dtype="uint16", channels=2, **keys).mean_std
        for keys in (
            {"mean": [0.02, 0.04], "std": [0.01, 0.03]},
            {"mean": [1310.7, 2621.4], "std": [655.35, 1966.05], "scale": 1},
            {"mean": [0.13107, 0.26214], "std": [0.065535, 0.196605], "scale": 10000},
        )
    ]
    for mean, std in found:
        assert mean == pytest.approx((0.02, 0.04), rel=1e-6) and std == pytest.approx((0.01, 0.03), rel=1e-6)
    assert config(channels=1, mean=[127.5], std=[51], scale=1).mean_std == (pytest.approx((0.5,)), pytest.approx((0.2,)))
    assert config(dtype="float32", channels=1, mean=[-30], std=[500]).mean_std == ((-30.0,), (500.0,))


@pytest.mark.parametrize(
    "keys", [{"channels": 12}, {"dtype": "uint16"}, {"dtype": "float32", "channels": 1}, {"bands": [1, 2]}]
)
def test_no_mean_is_made_up(keys: dict):
    with pytest.raises(ConfigError, match="have no default; `fastjepa data stats` prints those of a data set"):
        _ = config(**keys).mean_std


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"bands": [3, 2, 1], "channels": 4}, "data.channels: 4 contradicts the 3 of data.bands; make it 3, or leave it out"),
        ({"bands": []}, "one or more whole numbers, 0 or greater"),
        ({"bands": [0, -1]}, "one or more whole numbers, 0 or greater"),
        ({"nodata": 256}, "data.nodata: 256 is no value of uint8; give a whole number from 0 to 255"),
        ({"nodata": -1, "dtype": "uint16"}, "data.nodata: -1 is no value of uint16; give a whole number from 0 to 65535"),
        ({"nodata": 0.5, "dtype": "uint16"}, "data.nodata: 0.5 is no value of uint16"),
        ({"dtype": "float32", "channels": 1, "std": [0]}, "data.std: must be greater than 0"),
        ({"dtype": "uint16", "channels": 1, "mean": [1200]}, r"divide values of 0..65535 by 65535: \[0.018\]"),
        (
            {"dtype": "uint16", "channels": 1, "mean": [7e4], "scale": 1},
            "data.mean: 70000 is not of pixels that count from 0 to 65535",
        ),
        ({"dtype": "uint16", "channels": 1, "std": [0.01], "scale": 1}, "data.std: 0.01 must be greater than 0.1"),
        (
            {"channels": 12, "mean": [0.5] * 3},
            "data.mean: needs 12 numbers, one a channel, not 3; `fastjepa data stats` prints",
        ),
        ({"dtype": "int16"}, "must be uint8 or uint16 or float32"),
    ],
)
def test_keys_that_no_image_can_have_are_refused(keys: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        config(**keys)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_crops_are_resized_without_rounding_to_8_bits(dtype: str):
    """Equal to torchvision's on floats; of uint16 the nearest whole numbers."""
    image = torch.from_numpy(measured(12, 40, 30, dtype=dtype))
    for box, size in (((3, 5, 20, 24), (16, 16)), ((0, 0, 40, 30), (64, 48)), ((1, 2, 16, 16), (16, 16))):
        ours, exact = crop_image(image, box, size), resized_crop(image.float(), *box, list(size), antialias=True)
        assert ours.dtype == image.dtype and (ours.float() - exact).abs().max() <= (0.5 if dtype == "uint16" else 0)
        assert len(np.unique(ours)) > 250 * (size[0] > 16) and torch.equal(
            crop_image(image, box, size, flip=True), ours.flip(-1)
        )
    fitted, exact = fit_to(image, (16, 16)), fit_to(image.float(), (16, 16))
    assert fitted.dtype == image.dtype and (fitted.float() - exact).abs().max() <= 0.5
