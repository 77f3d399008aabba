"""Evaluations of runs on 12 bands of floats, on chosen bands and on grey, of 16 bits: all see the values of the files."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fastjepa.cli.main import main
from fastjepa.data.pixels import Pixels
from fastjepa.data.sources import open_source
from fastjepa.evals import kmeans, linear
from fastjepa.evals.augment import Augment
from fastjepa.evals.images import EvalImages
from fastjepa.evals.inputs import Subject, open_splits, open_subject
from fastjepa.evals.kmeans import kmeans_features
from tests.support.arrays import measured, npy
from tests.support.evals import ARRAYS, write_array_run


@pytest.fixture(scope="module", params=ARRAYS)
def any_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_array_run(tmp_path_factory.mktemp("arrays"), request.param)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_array_run(tmp_path_factory.mktemp("arrays"), "float32 bands")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MIN_STEPS", 20)


def normalised(subject: Subject, rows: int) -> torch.Tensor:
    """The first training images, read by tifffile alone, as the network takes them."""
    source, bands = open_source(subject.config.data.address), subject.config.data.bands
    stored = [bands_of(tifffile.imread(source.name(i))) for i in range(rows)]
    chosen = [values[list(bands)] if bands else values for values in stored]
    return torch.from_numpy(np.stack(chosen).astype(np.float32) / 10000 - 0.3) / 0.25


def bands_of(stored: np.ndarray) -> np.ndarray:
    """Bring a file's bands (H, W), (12, H, W) or (H, W, 12) to the front."""
    return stored[None] if stored.ndim == 2 else stored if len(stored) == 12 else stored.transpose(2, 0, 1)


def evaluated(run: Path, kind: str, *words: object) -> int:
    data = [] if "--images" in words else ["--data", str(run.parent / "set")]
    return main(["eval", kind, "--checkpoint", str(run), *data, "--device", "cpu", *map(str, words)])


def test_features_are_those_of_the_files_values(any_run):
    """Images of the files' own size are not resized, so that nothing lies between them and the network."""
    subject = open_subject(any_run, "cpu", cache=False, image_size=20)
    splits, images = open_splits(str(any_run.parent / "set"), None, None, 0), normalised(subject, 24)
    found, _ = subject.features("target", splits)
    torch.testing.assert_close(found.x, subject.encoder("target").features(images).mean(dim=1), rtol=1e-3, atol=1e-3)
    pixels, _ = subject.features("pixels", splits)
    torch.testing.assert_close(pixels.x, images.flatten(1), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_table_tells_classes_of_many_bands(any_run, capsys):
    """Which band shows which shape is the class; of one band alone a linear layer on moved shapes knows little."""
    assert evaluated(any_run, "table", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows["raw pixels"]["linear"]["accuracy"] > (0.1 if open_subject(any_run, "cpu").pixels.channels == 1 else 0.9)
    assert rows["target encoder"]["effective_rank"] > 2


KINDS = [("transfer",), ("linear_bn", "--views", 2), ("attentive", "--epochs", 1)]
HEAVY = [("lowshot", "--fraction", 0.5, "--c", 1), ("lowshot", "--method", "finetune", "--epochs", 1, "--fraction", 1)]


@pytest.mark.parametrize("words", [*KINDS, *(pytest.param(words, marks=pytest.mark.slow) for words in HEAVY)])
def test_the_command_answers(run, capsys, words):
    assert evaluated(run, *words, "--json", "--no-cache") == 0
    said = json.loads(capsys.readouterr().out)
    assert said.get("n_test", said.get("rows", [{}])[0].get("knn", {}).get("n_test")) == 12


def test_fine_tuning_says_that_values_are_left_as_they_are(run, capsys):
    assert evaluated(run, "finetune", "--epochs", 1, "--n-train", 8) == 0
    assert "moves, shears and turns them, and leaves their values" in " ".join(capsys.readouterr().err.split())


def test_a_kind_whose_images_are_pictures_is_refused(run, capsys):
    assert main(["eval", "lowlevel", "--checkpoint", str(run), "--data", "/nowhere", "--task", "count"]) == 2
    said = capsys.readouterr().err
    assert "takes arrays (" in said and "those of CLEVR and the scenes are pictures" in said


@pytest.mark.slow
def test_classes_of_pixels_are_measured_and_drawn(any_run, tmp_path, capsys):
    """The label image of a picture says where its first band is bright."""
    run = any_run
    for split in ("train", "test"):
        for file in sorted((run.parent / "set" / split).rglob("*.tif"))[::3]:
            band = bands_of(tifffile.imread(file))[0]
            label = tmp_path / "labels" / split / file.parent.name / f"{file.stem}.png"
            label.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((band > 3000).astype(np.uint8)).save(label)
            (tmp_path / f"{split}.txt").open("a").write(f"{file.parent.name}/{file.stem}\n")
    folders = [[f"{root}/{split}" for split in ("train", "test")] for root in (run.parent / "set", tmp_path / "labels")]
    lists = [tmp_path / "train.txt", tmp_path / "test.txt"]
    words = ["--task", "segmentation", "--images", *folders[0], "--labels", *folders[1], "--lists", *lists, "--steps", 20,
             "--encoder", "pixels", "target", "--pictures", tmp_path, "--json", "--no-cache"]  # fmt: skip
    assert evaluated(run, "dense", *words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["n_train"] == 8 and said["n_test"] == 4 and said["classes"] == 2
    assert np.asarray(Image.open(said["pictures"])).std() > 20


VALUES = measured(12, 24, 24, dtype="float32")


@pytest.mark.parametrize("rand_augment", [False, True])
def test_a_view_keeps_channels_dtype_and_depth(rand_augment):
    """Nearest neighbours of a crop's own values: what geometry brings in is of the image, or the mean of its channel."""
    mean_std = tuple(np.linspace(5, 6, 12).tolist()), (1.0,) * 12
    make = partial(Augment, 0, rand_augment=rand_augment)
    for dtype, values in ((torch.float32, VALUES), (torch.uint16, measured(12, 24, 24))):
        pixels, image = Pixels(12, dtype, mean_std=mean_std), torch.from_numpy(values)
        views = [make(view, pixels=pixels)(image, 3, (16, 16)) for view in range(20)]
        assert all(view.dtype == dtype and view.shape == (12, 16, 16) for view in views)
        assert all(len(view.float().unique()) > 1000 for view in views)
        crops = [Augment(0, view)(image, 3, (16, 16)) for view in range(20)]
        fill = torch.from_numpy(pixels.fill).float()
        for view, crop in zip(views, crops, strict=True):
            own = [torch.isin(v.float(), torch.cat((c.float().flatten(), f.flatten()))).all()
                   for v, c, f in zip(view, crop, fill, strict=True)]  # fmt: skip
            assert all(own)
        moved = [not torch.equal(view.float(), crop.float()) for view, crop in zip(views, crops, strict=True)]
        assert any(moved) == rand_augment


def test_k_means_of_arrays_are_those_of_pictures_of_the_same_values(tmp_path, monkeypatch):
    """A deviation of a quarter of the bytes' range leaves them what they are as pictures; the units do not matter."""
    monkeypatch.setattr(kmeans, "SAMPLED_PATCHES", 2000)
    monkeypatch.setattr(kmeans, "ROUNDS", 3)
    for i in range(8):
        for folder, factor in (("bytes", 1), ("units", 1e-3)):
            values = measured(3, 16, 12, dtype="uint8", seed=i)
            file = tmp_path / folder / "train" / "ab"[i % 2] / f"{i}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(npy(values if factor == 1 else values.astype(np.float32) * factor))
    deep = Pixels(3, torch.float32, mean_std=((0.0,) * 3, (1e-3 * 255 * 0.25,) * 3))
    sets = [EvalImages(open_source(str(tmp_path / folder)), (16, 12), pixels)
            for folder, pixels in (("bytes", Pixels(3)), ("units", deep))]  # fmt: skip
    pictures, arrays = (kmeans_features(images, images, 0)[0].x for images in sets)
    torch.testing.assert_close(arrays, pictures, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("channels", "side"), [(1, 64), (3, 64), (4, 32), (12, 32), (13, 30), (200, 7)])
def test_raw_pixels_are_no_more_values_of_many_bands_than_of_three(run, channels, side):
    subject = open_subject(run, "cpu", image_size=64)
    data = dataclasses.replace(subject.config.data, channels=channels, mean=None, std=None)
    subject = dataclasses.replace(subject, config=dataclasses.replace(subject.config, data=data))
    assert subject.pixel_size == (side, side) and channels * side**2 <= 3 * 64 * 64
