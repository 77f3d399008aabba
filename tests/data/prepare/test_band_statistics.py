"""`data stats` measures what numpy measures on the whole, and its lines make a config that normalises the data set."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

from fastjepa.cli.main import main
from fastjepa.config.load import config_from_dict
from fastjepa.data.prepare import band_statistics
from fastjepa.data.prepare.band_statistics import BandRequest, Moments, measure_bands, rows_to_measure
from fastjepa.data.sources import open_source
from fastjepa.errors import UserError
from fastjepa.loader.loader import pixels_of
from tests.support.images import encode_png, write_idx_pairs


def whole(images: list[np.ndarray]) -> np.ndarray:
    """All values of images (C, H, W), as (C, values) float64."""
    return np.concatenate([image.reshape(len(image), -1) for image in images], axis=1).astype(np.float64)


def agree(found: Moments, values: np.ndarray) -> bool:
    """Whether moments are those of values (C, n), NaN where nothing is measured."""
    theirs = [np.nanmean(values, 1), np.nanstd(values, 1), np.nanmin(values, 1), np.nanmax(values, 1)]
    close = [
        np.allclose(a, b, rtol=1e-9) for a, b in zip((found.mean, found.std, found.least, found.most), theirs, strict=True)
    ]
    return (
        all(close)
        and np.array_equal(found.missing, np.isnan(values).sum(1))
        and values[0].size == (found.count + found.missing)[0]
    )


def write_pictures(folder: Path, grey: int, coloured: int) -> list[np.ndarray]:
    """PNGs of several sizes: the images (C, H, W), the grey ones first."""
    folder.mkdir()
    random = np.random.default_rng(0)
    sizes = [(int(random.integers(3, 40)), int(random.integers(3, 40))) for _ in range(grey + coloured)]
    images = [random.integers(0, 200, (h, w) if i < grey else (h, w, 3), dtype=np.uint8) for i, (h, w) in enumerate(sizes)]
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return [np.atleast_3d(image).transpose(2, 0, 1) for image in images]


def write_arrays(folder: Path, images: list[np.ndarray]) -> Path:
    """TIFF files of images (C, H, W), each channel a plane."""
    folder.mkdir()
    for i, image in enumerate(images):
        tifffile.imwrite(folder / f"{i:03d}.tif", image, photometric="minisblack", planarconfig="separate")
    return folder


@pytest.mark.parametrize("grey, coloured", [(9, 0), (0, 9), (4, 9)])
def test_pictures_are_measured_as_numpy_does_on_the_whole(tmp_path: Path, monkeypatch, grey: int, coloured: int):
    """The number of processes changes nothing; grey ones are three equal channels among coloured ones."""
    monkeypatch.setattr(band_statistics, "IMAGES_A_TASK", 2)
    images = write_pictures(tmp_path / "images", grey, coloured)
    channels = 3 if coloured else 1
    alone, helped = (measure_bands(open_source(tmp_path / "images"), BandRequest(), workers)[0] for workers in (1, 2))
    assert agree(alone.channels, whole([np.broadcast_to(image, (channels, *image.shape[1:])) for image in images]))
    assert alone.images == grey + coloured and alone.channels.rows() == helped.channels.rows()


def test_values_far_from_zero_keep_their_deviation(tmp_path: Path):
    """A sum of squares in float64 would lose it: 1e18 has no digits below 128."""
    random = np.random.default_rng(0)
    images = [(1e9 + random.normal(0, 1, (2, 20, 30))).astype(np.float64) for _ in range(40)]
    parts = [Moments.of(image, np.zeros((), bool)) for image in images]
    found = parts[0]
    for part in parts[1:]:
        found = found.merged(part)
    exact = whole(images)
    assert np.allclose(found.std, exact.std(1), rtol=1e-6) and np.allclose(found.mean, exact.mean(1), rtol=1e-15)
    naive = np.sqrt(abs(np.square(exact).mean(1) - exact.mean(1) ** 2))
    assert not np.allclose(naive, exact.std(1), rtol=0.1)


def test_values_without_measurement_are_counted_and_not_measured(tmp_path: Path):
    random = np.random.default_rng(0)
    images = [random.normal(5, 2, (12, 9, 7)).astype(np.float32) for _ in range(6)]
    images[0][0, :3], images[1][3, 0, 0], images[2][4] = np.nan, np.inf, -999
    images[3][5, 1, 1] = -np.inf
    found = measure_bands(open_source(write_arrays(tmp_path / "a", images)), BandRequest(nodata=-999), 1)[0].channels
    values = whole(images)
    values[~np.isfinite(values) | (values == -999)] = np.nan
    assert agree(found, values) and found.missing[:6].tolist() == [21, 0, 0, 1, 63, 1]
    unnamed = measure_bands(open_source(tmp_path / "a"), BandRequest(), 1)[0].channels
    assert unnamed.least[4] == -999 and unnamed.missing[4] == 0


SETS = {
    "grey": (lambda folder: write_pictures(folder, 6, 0), [], 1),
    "coloured": (lambda folder: write_pictures(folder, 3, 6), [], 3),
    "to grey": (lambda folder: write_pictures(folder, 0, 6), ["--channels", "1"], 1),
    "16 bits": (lambda folder: write_deep(folder), [], 1),
    "uint16": (lambda folder: write_arrays(folder, arrays(5, "uint16")), ["--nodata", "7"], 5),
    "uint8 of 5 bands": (lambda folder: write_arrays(folder, arrays(5, "uint8")), [], 5),
    "float32": (lambda folder: write_arrays(folder, arrays(12, "float32")), [], 12),
    "bands": (lambda folder: write_arrays(folder, arrays(12, "float32")), ["--bands", "3,0"], 2),
}


def arrays(bands: int, dtype: str) -> list[np.ndarray]:
    """Bands that differ in mean and deviation."""
    random = np.random.default_rng(0)
    means = 40 * np.arange(1, bands + 1)[:, None, None] * (200 if dtype == "uint16" else 1)
    return [(means * random.uniform(0.8, 1.2, (bands, 17, 19))).astype(dtype) for _ in range(6)]


def write_deep(folder: Path) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(6):
        (folder / f"{i}.png").write_bytes(encode_png(random.integers(0, 4096, (14, 15), dtype=np.uint16)))


@pytest.mark.parametrize("name", SETS)
def test_the_lines_make_a_config_that_normalises_the_images(tmp_path: Path, capsys, name: str):
    write, options, channels = SETS[name]
    write(tmp_path / "images")
    assert main(["data", "stats", str(tmp_path / "images"), "--workers", "1", *options]) == 0
    said = capsys.readouterr().out
    config = config_from_dict(yaml.safe_load(said[said.index("data:") :]))
    pixels, source = pixels_of(config), open_source(tmp_path / "images")
    assert config.data.channels == channels and f"\n  channels: {channels}\n" in said
    ready = whole([(pixels.decode(source.read(i)).image.numpy() / config.data.unit) for i in range(len(source))])
    mean, std = (np.array(values)[:, None] for values in config.mean_std)
    normal = (ready - mean) / std
    assert abs(normal.mean(1)).max() < 1e-3 and abs(normal.std(1) - 1).max() < 1e-3


def test_json_holds_the_rows_of_the_table_and_the_lines(tmp_path: Path, capsys):
    folder = write_arrays(tmp_path / "images", arrays(12, "float32"))
    assert main(["data", "stats", str(folder), "--workers", "1", "--json", "--bands", "3,0"]) == 0
    told = json.loads(capsys.readouterr().out)
    means = [row["mean"] for row in told["channels"]]
    assert means == pytest.approx([160, 40], rel=0.01)  # band b has 40 (b + 1)
    assert told["data"]["mean"] == pytest.approx(means, rel=1e-4)
    assert (told["data"]["bands"], told["data"]["dtype"], told["images"], told["bad"]) == ([3, 0], "float32", 6, [])


def test_idx_files_are_measured(tmp_path: Path):
    images = write_idx_pairs(tmp_path)
    found = measure_bands(open_source(tmp_path), BandRequest(), 1)[0].channels
    assert agree(found, images.reshape(1, -1).astype(np.float64))


def test_some_images_at_random_are_the_same_ones_each_time():
    rows = rows_to_measure(1000, 50).tolist()
    assert rows == rows_to_measure(1000, 50).tolist() == sorted(set(rows)) and len(rows) == 50
    assert max(np.diff(rows)) > 30 and max(rows) > 900  # they are neither the first ones nor evenly spaced
    assert rows_to_measure(10, 50).tolist() == rows_to_measure(10, None).tolist() == list(range(10))


def test_bad_files_are_named_counted_and_left_out(tmp_path: Path, capsys):
    images = write_pictures(tmp_path / "images", 0, 8)
    (tmp_path / "images" / "000.png").write_bytes(b"")
    (tmp_path / "images" / "003.png").write_bytes((tmp_path / "images" / "003.png").read_bytes()[:60])
    assert main(["data", "stats", str(tmp_path / "images"), "--workers", "1", "--json"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told["images"] == 8 and [Path(bad["path"]).name for bad in told["bad"]] == ["000.png", "003.png"]
    assert "000.png: zero bytes" in said.err and "003.png: truncated" in said.err
    left = whole([image for i, image in enumerate(images) if i not in (0, 3)])
    assert np.allclose([row["mean"] for row in told["channels"]], left.mean(1), rtol=1e-9)


def test_files_of_other_bands_than_the_first_are_bad(tmp_path: Path):
    fours = arrays(4, "uint16")
    folder = write_arrays(tmp_path / "mixed", [*fours, *arrays(5, "uint16")])
    report, pixels = measure_bands(open_source(folder), BandRequest(), 1)
    assert pixels.channels == 4 and agree(report.channels, whole(fours))
    assert [(Path(bad.path).name, bad.reason) for bad in report.bad] == [(f"{i:03d}.tif", "other bands") for i in range(6, 12)]


def test_what_cannot_be_measured_is_refused_by_name(tmp_path: Path):
    flat = write_arrays(tmp_path / "flat", [np.full((2, 5, 6), 7, np.uint16)])
    with pytest.raises(UserError, match="channel 0 has no value that is measured; .*--nodata"):
        measure_bands(open_source(flat), BandRequest(nodata=7), 1)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of 1 images can be read, for example .*a\.png: not an image"):
        measure_bands(open_source(tmp_path / "bad"), BandRequest(), 1)


def test_a_constant_channel_is_named(tmp_path: Path, capsys):
    folder = write_arrays(
        tmp_path / "flat", [np.stack([np.full((5, 6), 7, np.uint8), np.arange(30, dtype=np.uint8).reshape(5, 6)])]
    )
    assert main(["data", "stats", str(folder), "--workers", "1"]) == 0
    assert "channel 0 has one value alone" in capsys.readouterr().err
