"""Bands of arrays as pictures, and the pictures that commands make of runs on arrays."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastjepa.cli.main import main
from fastjepa.data.pixels import Pixels
from fastjepa.errors import UserError
from fastjepa.evals.inputs import open_subject
from fastjepa.report.pictures import gather_pictures
from fastjepa.report.recorded_run import read_recorded_run
from fastjepa.visualize.bands import ShownBands
from fastjepa.visualize.images import zoomed
from fastjepa.visualize.sheets import open_drawn_split, shown_images
from tests.support.arrays import measured
from tests.support.evals import write_array_run

DEEP = Pixels(12, torch.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_array_run(tmp_path_factory.mktemp("arrays"), "uint16 bands")


def stretched(values: np.ndarray) -> np.ndarray:
    """A band of all images (n, H, W), black at its 2nd percentile and white at its 98th, value by value."""
    low, high = (sorted_share(values, share) for share in (0.02, 0.98))
    return np.clip(np.round(255 * (values - low) / (high - low)), 0, 255).astype(np.uint8)


def sorted_share(values: np.ndarray, share: float) -> float:
    ordered = np.sort(values.flatten()).astype(float)
    place = share * (len(ordered) - 1)
    lower = int(place)
    return ordered[lower] + (place - lower) * (ordered[min(lower + 1, len(ordered) - 1)] - ordered[lower])


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("bands", [(3, 2, 1), (7,), None])
def test_each_band_is_stretched_over_all_images(dtype, bands):
    values = np.stack([measured(12, 8, 9, dtype=dtype, seed=seed) for seed in range(5)])
    shown = ShownBands.of(Pixels(12, getattr(torch, dtype)), bands)
    pictures = np.stack(shown.pictures(torch.from_numpy(values)))
    expected = [stretched(values[:, band]) for band in bands or (0, 1, 2)]
    assert pictures.shape == (5, 8, 9, 3)
    difference = np.abs(pictures.astype(int) - np.stack(expected * (3 // len(expected)), axis=3))
    assert difference.max() <= 1 and (difference == 0).mean() > 0.99  # a half is rounded up or down


def test_a_band_that_does_not_vary_is_mid_grey():
    images = torch.stack([torch.full((4, 4), 7.0), torch.arange(16.0).view(4, 4), torch.zeros(4, 4)])
    (picture,) = ShownBands.of(Pixels(3, torch.float32)).pictures([images])
    assert (picture[..., 0] == 128).all() and (picture[..., 2] == 128).all() and len(np.unique(picture[..., 1])) > 10


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_shown_as_they_are(channels):
    pixels = torch.randint(0, 60, (2, channels, 5, 6), dtype=torch.uint8)
    shown = np.stack(ShownBands.of(Pixels(channels)).pictures(pixels))
    assert np.array_equal(shown, pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy())
    assert np.array_equal(ShownBands.of(Pixels(3), (2, 1, 0)).pictures(pixels.expand(-1, 3, -1, -1))[0], shown[0][..., ::-1])


def test_a_band_is_that_of_the_file_and_one_that_is_not_seen_is_refused():
    chosen = Pixels(3, torch.uint16, bands=(7, 5, 3))
    assert ShownBands.of(chosen, (3, 5, 7)).channels == (2, 1, 0)
    assert str(ShownBands.of(chosen)).startswith("bands 7, 5, 3 as red, green and blue, stretched from percentile 2 to 98 of ")
    with pytest.raises(UserError, match="--bands 2: the network sees the bands 7, 5, 3; choose one or three"):
        ShownBands.of(chosen, (2,))
    with pytest.raises(UserError, match="--bands 12: the network sees the bands 0 to 11;"):
        ShownBands.of(DEEP, (12, 1, 0))


def test_the_commands_show_the_bands_that_were_asked_for(run, tmp_path, capsys):
    words = f"--data {run.parent / 'set'} --images 3 --n-train 24 --n-test 12 --k 2 --device cpu".split()
    assert main(["visualize", str(run), *words, "--bands", "3,2,5", "--output", str(tmp_path)]) == 0
    assert "images are shown by bands 3, 2, 5 as red" in capsys.readouterr().err
    subject = open_subject(run, "cpu", cache=False)
    images = shown_images(subject, open_drawn_split(str(run.parent / "set"), "test", 12, 0), 3)
    first = zoomed(ShownBands.of(subject.pixels, (3, 2, 5)).pictures(images)[0])  # of channels 1, 2 and 0
    sheet = np.asarray(Image.open(tmp_path / "masks.png"))
    assert any(np.array_equal(sheet[top : top + len(first), : len(first[0])], first) for top in range(40))
    assert {file.name for file in tmp_path.glob("*")} == {"masks.png", "pca.png", "neighbours.png", "neighbours.json"}
    with pytest.raises(SystemExit):
        main(["visualize", str(run), *words, "--bands", "3,2", "--output", str(tmp_path)])
    assert "3,2 are 2 bands; give one (grey) or three" in capsys.readouterr().err


def test_a_page_shows_other_bands_where_they_are_asked_for(run):
    recorded = read_recorded_run(run)
    (first, missing), (other, _) = gather_pictures(recorded), gather_pictures(recorded, (1, 2, 3))
    assert missing is None and [one["title"] for one in first][:2] == [one["title"] for one in other][:2]
    assert all(one["source"] != another["source"] for one, another in zip(first, other, strict=True))
    assert gather_pictures(recorded, (0,)) == (
        [],
        "--bands 0: the network sees the bands 5, 3, 2, 1; choose one or three of them",
    )


def test_a_decoder_of_arrays_is_refused(run, tmp_path, capsys):
    words = ["--data", str(run.parent / "set"), "--device", "cpu", "--output", str(tmp_path), "--steps", "1"]
    assert main(["decoder", str(run), *words]) == 2
    assert "takes arrays (4 channels of uint16), and a decoder draws pictures alone" in capsys.readouterr().err
