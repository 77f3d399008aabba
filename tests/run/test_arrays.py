"""Runs on images of 12 bands and of 16 bits: they learn, resume to the bit, and are the same from shards."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fastjepa.cli.main import main
from fastjepa.data.decode_pillow import decode_image
from fastjepa.data.pixels import normalise_pixels
from fastjepa.data.sources import open_source
from fastjepa.evals.images import EvalImages
from fastjepa.evals.inputs import open_subject
from tests.support import ranks
from tests.support.arrays import BANDS, write_shapes
from tests.support.images import encode_png
from tests.support.runs import TINY, lines, losses, same_weights, trained, weights, without_times

REFLECTANCES = {"dtype": "uint16", "channels": BANDS, "scale": 10000, "mean": [0.3] * BANDS, "std": [0.25] * BANDS}
FEW = ["data.num_workers=0", "logging.probe_every=3"]


def written(folder: Path, source: Path, **keys) -> Path:
    """A config of a toy run over images of 16 pixels."""
    data = {"batch_size": 16, "crop_size": 16, "num_workers": 1, "source": str(source)} | keys
    file = folder / "arrays.yaml"
    mask = TINY["mask"] | {"min_keep": 0}
    file.write_text(yaml.safe_dump(TINY | {"data": data, "mask": mask}))
    return file


@pytest.fixture(scope="module")
def bands(tmp_path_factory) -> Path:
    """A config over 48 TIFFs of 12 bands: three steps an epoch, six in all."""
    root = tmp_path_factory.mktemp("bands")
    return written(root, write_shapes(root / "set", 48, 20), **REFLECTANCES)


@pytest.fixture(scope="module")
def run(bands, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run")
    trained(bands, output, *FEW)
    return output


def test_twelve_bands_train_and_resume_bit_for_bit(bands, run, tmp_path):
    """Stopped within an epoch, and every band has moved the weights that see it."""
    trained(bands, tmp_path, "--max-steps", 2, *FEW)
    entries = trained(bands, tmp_path, "--resume", "must", *FEW)
    assert without_times(entries)[2:] == without_times(lines(run))[2:]
    assert same_weights(weights(tmp_path, 6), weights(run, 6))
    subject = open_subject(run, "cpu")
    before, after = (subject.encoder(which).patch_embed.proj.weight for which in ("random", "context"))
    assert after.shape == (32, BANDS, 4, 4) and bool(((before - after).abs().amax((0, 2, 3)) > 1e-4).all())
    record = json.loads((run / "run.json").read_text())
    assert record["decoder"] == "torch" and record["config"]["data"]["dtype"] == "uint16"


@pytest.mark.slow
def test_a_run_on_shards_is_the_run_on_the_folder(bands, run, tmp_path):
    source = yaml.safe_load(bands.read_text())["data"]["source"]
    assert main(["data", "shard", source, str(tmp_path / "shards"), "--keep-order", "--workers", "1"]) == 0
    entries = trained(bands, tmp_path / "run", f"data.source={tmp_path / 'shards'}", "--max-steps", 3, *FEW)
    assert losses(entries) == losses(lines(run))[:3]


def test_an_evaluation_decodes_as_the_run_did(run):
    """Images are those of 16 bits, and the encoder gives the same for them as for floats that are normalised."""
    subject = open_subject(run, "cpu")
    (shown,) = EvalImages(open_source(subject.config.data.address), (16, 16), subject.pixels, np.arange(3)).batches(3)
    floats = (shown.float() / 10000 - 0.3) / 0.25
    encoder = subject.encoder("target")
    assert shown.dtype == torch.uint16 and shown.float().max() > 3000
    torch.testing.assert_close(encoder.features(shown), encoder.features(floats), rtol=1e-4, atol=1e-4)
    assert torch.allclose(normalise_pixels(shown, subject.config.mean_std), floats, rtol=1e-4, atol=1e-4)


def test_floats_of_the_same_values_are_the_same_run(bands, run, tmp_path):
    """The loader normalises them, what for uint16 the embedding does."""
    entries = trained(bands, tmp_path, "data.dtype=float32", "--max-steps", 2, *FEW)
    assert losses(entries) == pytest.approx(losses(lines(run))[:2], rel=1e-4)


@pytest.mark.slow
def test_floats_of_the_same_values_are_the_same_targets(bands, tmp_path):
    settings = ["loss.target=pixels", "--max-steps", 2, *FEW]
    deep = trained(bands, tmp_path / "deep", *settings)
    wide = trained(bands, tmp_path / "wide", "data.dtype=float32", *settings)
    assert losses(wide) == pytest.approx(losses(deep), rel=1e-4)


def test_no_mean_is_refused_before_anything_is_written(bands, tmp_path, capsys):
    words = ["--config", str(bands), "--output", str(tmp_path / "run"), "data.mean=", "data.std="]
    assert main(["train", *words]) == 2
    assert "12 channels of uint16 have no default; `fastjepa data stats`" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", [["runtime.zero=1"], ["runtime.zero=0"]])
def test_two_ranks_are_one(bands, run, tmp_path, engine):
    two = ranks.train(2, "--config", bands, "--output", tmp_path, "data.batch_size=8", "--max-steps", 3, *engine, *FEW)
    ranks.succeeded(two)
    assert losses(lines(tmp_path)) == pytest.approx(losses(lines(run))[:3], rel=1e-3)


LONG = ["optimization.epochs=6", "loss.regularizer=vicreg", "logging.probe_every=120", "mask.truncate_group=50"]


def fell(entries: list[dict]) -> bool:
    """Whether the loss of the last ten steps is below that of the first ten, and features tell the classes at the end."""
    found = losses(entries)
    return sum(found[-10:]) < 0.95 * sum(found[:10]) and entries[-1]["knn"] > 0.9


@pytest.mark.slow
def test_a_thousand_images_of_twelve_bands_are_learned(tmp_path, capsys):
    """Classes are told by which band shows which shape, under noise larger than the shapes; an untrained encoder sees less."""
    images = tmp_path / "set"
    for split, count in (("train", 1000), ("test", 400)):
        write_shapes(images, count, 20, split=split, noise=10_000)
    config = written(tmp_path, images, **REFLECTANCES | {"batch_size": 50})
    muon = ["optimization.optimizer=muon", "optimization.muon_lr=0.008", "optimization.lr=0.004", "optimization.epochs=10"]
    trained(config, tmp_path / "run", "loss.target=pixels", "mask.truncate_group=50", "logging.probe_every=0", *muon)
    capsys.readouterr()
    accuracy = {}
    for encoder in ("random", "target"):
        words = ["--checkpoint", str(tmp_path / "run"), "--data", str(images), "--encoder", encoder, "--json"]
        assert main(["eval", "knn", *words]) in (None, 0)
        accuracy[encoder] = json.loads(capsys.readouterr().out)["accuracy"]
    assert accuracy["target"] > accuracy["random"] + 0.05 > 0.4, accuracy


@pytest.mark.slow
def test_a_thousand_images_of_16_bit_grey_are_learned(tmp_path):
    """Waves of 120 levels, of which 8 bits keep one or two; a stopped run goes on to the bit."""
    random = np.random.default_rng(0)
    for i in range(1000):
        y, x = np.mgrid[:24, :24]
        period, phase = (3, 4, 6, 8)[i % 4], random.uniform(0, 6)
        waves = 2000 + 60 * np.sin(2 * np.pi * (x if i % 2 else y) / period + phase) + random.normal(scale=10, size=(24, 24))
        folder = tmp_path / "set" / "train" / f"class{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        raw = encode_png(waves.astype(np.uint16))
        (folder / f"{i:04}.png").write_bytes(raw)
    assert len(decode_image(raw, 1).unique()) <= 3
    keys = {"dtype": "uint16", "channels": 1, "scale": 1, "mean": [2000], "std": [45], "batch_size": 50}
    config = written(tmp_path, tmp_path / "set", **keys)
    assert fell(trained(config, tmp_path / "run", *LONG))
    trained(config, tmp_path / "parts", "--max-steps", 30, *LONG)
    trained(config, tmp_path / "parts", "--resume", "must", *LONG)
    assert same_weights(weights(tmp_path / "parts", 120), weights(tmp_path / "run", 120))
