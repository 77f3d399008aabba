"""Evaluations of checkpoints: images as they should be seen and in the order they lie, the cache, the commands."""

import json
import math
import os
import re
import signal
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from torchvision.transforms.v2 import functional as vision

from fastjepa.checkpoint.restore import load_networks
from fastjepa.config.load import config_from_dict
from fastjepa.data.crops import fit_to
from fastjepa.data.pixels import Pixels
from fastjepa.data.sources import open_source
from fastjepa.errors import LoaderError, UserError
from fastjepa.evals import features, inputs, linear
from fastjepa.evals import images as evals_images
from fastjepa.evals.cache import weights_fingerprint
from fastjepa.evals.collapse import effective_rank
from fastjepa.evals.features import extract_features, raw_pixels
from fastjepa.evals.images import EvalImages
from fastjepa.evals.inputs import open_splits, open_subject, read_config
from fastjepa.evals.knn import knn_accuracy
from fastjepa.evals.linear import linear_accuracy
from fastjepa.evals.request import EvalRequest
from fastjepa.evals.scoring import Features
from fastjepa.evals.table import evaluate_probe, evaluate_table, table_verdict
from fastjepa.loader.workers import Crew
from fastjepa.model.jepa import build_pair
from fastjepa.weights.pretrained import EncoderForm
from fastjepa.weights.read import load_encoder, read_weights
from tests.support.evals import GREY, SMALL, write_images, write_run


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the probe's steps, where a test compares probes with each other."""
    monkeypatch.setattr(linear, "MIN_STEPS", 200)


@given(st.integers(8, 60), st.integers(8, 60), st.sampled_from([(16, 16), (24, 24), (32, 32)]))
@settings(max_examples=40)
def test_evaluation_view_equals_torchvision(height: int, width: int, size: tuple[int, int]):
    """Resize the short side to 8/7 of the crop, then crop the centre; an image of the right size is left alone."""
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(height))
    found = fit_to(image, size)
    if (height, width) == size:
        assert torch.equal(found, image)
    else:
        resized = vision.resize(image, [round(size[0] * 256 / 224)], antialias=True)
        assert torch.equal(found, vision.center_crop(resized, list(size)))


@given(st.integers(4, 80), st.integers(4, 80), st.integers(4, 40), st.integers(4, 40))
@settings(max_examples=40)
def test_evaluation_view_fills_any_size(height: int, width: int, rows: int, columns: int):
    view = fit_to(torch.full((1, height, width), 7, dtype=torch.uint8), (rows, columns))
    assert view.shape == (1, rows, columns) and (view == 7).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_features_lie_in_source_order(images: Path, workers: int, monkeypatch: pytest.MonkeyPatch):
    source, encoder = open_source(images), build_pair(config_from_dict(SMALL, "test"))[1]
    monkeypatch.setattr(features, "FORWARD_BATCH", 7)
    found = extract_features(encoder, EvalImages(source, (16, 16), Pixels(1), workers=workers), GREY)
    assert found.y.tolist() == [source.label(i) for i in range(len(source))] == [0] * 20 + [1] * 20
    for i in (0, 13, 39):
        pixels = torch.from_numpy(np.array(Image.open(source.name(i))))[None, None] / 255
        expected = encoder.features((pixels - 0.5) / 0.25).mean(dim=1)[0]
        assert torch.allclose(found.x[i], expected, atol=1e-5)
    rows = np.array([39, 2, 13])
    some = extract_features(encoder, EvalImages(source, (16, 16), Pixels(1), rows), GREY)
    assert torch.equal(some.y, found.y[rows]) and torch.allclose(some.x, found.x[rows], atol=1e-5)


def test_raw_pixels_separate_dark_from_bright(images: Path):
    train, test = (raw_pixels(EvalImages(open_source(images, split), (16, 16), Pixels(1)), GREY) for split in ("train", "test"))
    assert train.x.shape == (40, 256) and -2 <= float(train.x.min()) < float(train.x.max()) <= 2
    first = np.array(Image.open(open_source(images).name(0))).reshape(-1)
    assert torch.allclose(train.x[0], torch.from_numpy((first / 255 - 0.5) / 0.25).float())
    assert linear_accuracy(train, test, 2).accuracy == 1.0
    centred = [Features(part.x - train.x.mean(), part.y) for part in (train, test)]
    assert knn_accuracy(*centred, 2).accuracy == 1.0


@pytest.fixture
def one_core() -> Iterator[None]:
    """One core for this process, as a scheduler may give it on a larger machine."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("one_core")
def test_an_evaluation_starts_no_more_processes_than_it_may_use_cores(images: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evals_images, "FEW_IMAGES", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of processes that must share cores
        assert len(raw_pixels(EvalImages(open_source(images), (16, 16), Pixels(1)), GREY).x) == 40


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_in_one_sentence(tmp_path: Path, workers: int):
    source = open_source(write_images(tmp_path))
    Path(source.name(11)).write_bytes(b"not a png")
    with pytest.raises(OSError, match="cannot be evaluated") as error:
        raw_pixels(EvalImages(source, (16, 16), Pixels(1), workers=workers), GREY)
    assert source.name(11) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("number", "says"), [(signal.SIGKILL, "was killed by SIGKILL"), (signal.SIGSTOP, "nothing for 1 s:")])
def test_a_process_that_dies_or_stands_still_ends_the_evaluation(images: Path, monkeypatch, number: int, says: str):
    monkeypatch.setattr(evals_images, "Crew", partial(Crew, timeout=1.0))
    fit = lambda image, row, size: os.kill(os.getpid(), number) or fit_to(image, size)  # noqa: E731
    with pytest.raises(LoaderError, match=says) as error:
        raw_pixels(EvalImages(open_source(images), (16, 16), Pixels(1), augment=fit, workers=1), GREY)
    assert "\n" not in str(error.value) and "runtime.timeout" not in str(error.value)


@pytest.mark.parametrize(
    "size, channels, message", [((16, 16), 3, "takes 1-channel images, not 3"), ((18, 16), 1, "18x16 pixels .* 4x4")]
)
def test_images_the_encoder_cannot_take_are_refused(images: Path, size: tuple[int, int], channels: int, message: str):
    encoder = build_pair(config_from_dict(SMALL, "test"))[1]
    with pytest.raises(UserError, match=message):
        extract_features(encoder, EvalImages(open_source(images), size, Pixels(channels)), GREY)


def test_features_that_are_not_finite_are_refused(images: Path):
    encoder = build_pair(config_from_dict(SMALL, "test"))[1]
    encoder.norm.bias.data[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        extract_features(encoder, EvalImages(open_source(images), (16, 16), Pixels(1)), GREY)


def test_images_without_labels_are_refused(tmp_path: Path, run: Path, images: Path, monkeypatch: pytest.MonkeyPatch):
    for split in ("train", "test"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        Image.new("L", (16, 16)).save(tmp_path / "flat" / split / "a.png")
    with pytest.raises(UserError, match="class folders"):
        evaluate_probe("knn", EvalRequest(run, str(tmp_path / "flat")))
    with pytest.raises(UserError, match="a.png: has no label"):
        raw_pixels(EvalImages(open_source(tmp_path / "flat"), (16, 16), Pixels(1)), GREY)
    partly = open_source(images)
    monkeypatch.setattr(partly, "label", lambda i: None if i == 5 else 0)
    with pytest.raises(UserError, match=re.escape(partly.name(5))):
        raw_pixels(EvalImages(partly, (16, 16), Pixels(1)), GREY)


def test_splits_with_different_classes_are_refused(tmp_path: Path, run: Path):
    data = write_images(tmp_path / "data")
    (data / "test" / "class0").rename(data / "test" / "class7")
    with pytest.raises(UserError, match="its test split are of class 'class7' without training images"):
        evaluate_probe("knn", EvalRequest(run, str(data)))


def test_each_encoder_is_the_one_asked_for(run: Path):
    target, context, untrained = (open_subject(run).encoder(which) for which in ("target", "context", "random"))
    stored = load_networks(run)
    for encoder, name in ((target, "target_encoder"), (context, "encoder")):
        assert all(torch.equal(tensor, stored[name][key]) for key, tensor in encoder.state_dict().items())
    fresh = build_pair(config_from_dict(SMALL, "test"))[0].encoder
    assert weights_fingerprint(untrained) == weights_fingerprint(fresh)
    assert weights_fingerprint(target) != weights_fingerprint(context)
    assert not target.training and not any(p.requires_grad for p in target.parameters())


def test_a_checkpoint_is_found_from_its_run_or_by_itself(run: Path):
    lone = run / "checkpoints" / "jepa-00000003"
    assert weights_fingerprint(load_encoder(lone)) == weights_fingerprint(load_encoder(run))
    moved = lone.rename(run.parent / "jepa-00000003")
    assert read_config(moved) == config_from_dict(SMALL, "test")
    with pytest.raises(UserError, match="name the run directory"):
        read_config(moved / "encoder.safetensors")


def test_weights_of_another_shape_are_refused(run: Path):
    other = config_from_dict(SMALL | {"meta": SMALL["meta"] | {"embed_dim": 64}}, "test")
    with pytest.raises(UserError, match=r"proj.bias is \(32,\), and \(64,\) by its config"):
        read_weights(run, "target", EncoderForm.of_config(other))


def test_cache_gives_the_same_bytes_and_misses_changed_weights(run: Path, images: Path, monkeypatch: pytest.MonkeyPatch):
    made, extract = [], extract_features
    monkeypatch.setattr(inputs, "extract_features", lambda *args, **kw: made.append(1) or extract(*args, **kw))
    splits = open_splits(str(images), None, 10, 0)
    first = open_subject(run).features("target", splits)
    assert len(made) == 2 and len(list((run / "features").glob("*.safetensors"))) == 2
    second = open_subject(run).features("target", splits)
    assert len(made) == 2  # both from the cache
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before.x, after.x) and torch.equal(before.y, after.y)
    write_run(run, change=0.4, step=4)
    third = open_subject(run).features("target", splits)
    assert len(made) == 4 and not torch.equal(third[0].x, first[0].x)
    open_subject(run).features("target", open_splits(str(images), None, 11, 0))
    assert len(made) == 5  # another count of test images, the same training images
    open_subject(run, cache=False).features("target", splits)
    assert len(made) == 7
    assert not list((run / "features").glob(".*"))


def test_cache_misses_when_an_image_is_exchanged_for_another(run: Path, tmp_path: Path):
    data = write_images(tmp_path / "data")
    before = open_subject(run).features("target", open_splits(str(data), None, None, 0))
    Image.new("L", (16, 16)).save(data / "test" / "class1" / "0001b.png")
    (data / "test" / "class1" / "0001.png").unlink()
    after = open_subject(run).features("target", open_splits(str(data), None, None, 0))
    assert torch.equal(before[0].x, after[0].x) and torch.equal(before[1].y, after[1].y)
    assert torch.equal(before[1].x[:10], after[1].x[:10]) and not torch.equal(before[1].x[10], after[1].x[10])


def test_a_damaged_cache_file_is_named(run: Path, images: Path):
    evaluate_probe("knn", EvalRequest(run, str(images)))
    for file in (run / "features").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(OSError, match="delete the file"):
        evaluate_probe("knn", EvalRequest(run, str(images)))


@pytest.mark.parametrize("kind", ["knn", "linear", "linear_bn"])
def test_run_gives_what_its_json_promises(run: Path, images: Path, kind: str, quick: None):
    result = json.loads(json.dumps(evaluate_probe(kind, EvalRequest(run, str(images), "context", n_train=30))))
    assert result["encoder"] == "context" and result["data"] == str(images)
    assert (result["n_train"], result["n_test"]) == (30, 20)
    assert 0 <= result["ci95"][0] <= result["accuracy"] <= result["ci95"][1] <= 1


def test_an_unknown_probe_is_refused(run: Path, images: Path):
    with pytest.raises(UserError, match="choose knn or linear"):
        evaluate_probe("forest", EvalRequest(run, str(images)))


def test_table_puts_every_encoder_through_the_same_probes(run: Path, images: Path, quick: None):
    out = Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: SIM115
    found = evaluate_table(EvalRequest(run, str(images)), out)
    assert json.loads((run / "evaluation.json").read_text()) == found
    assert list(found["rows"]) == ["raw pixels", "random encoder", "context encoder", "target encoder"]
    for which in ("random", "context", "target"):
        row = found["rows"][f"{which} encoder"]
        shown = EvalImages(open_source(images, "test"), (16, 16), Pixels(1))
        test = extract_features(open_subject(run).encoder(which), shown, GREY)
        assert row["effective_rank"] == pytest.approx(effective_rank(test.x), rel=1e-5)
        assert row["knn"]["accuracy"] == evaluate_probe("knn", EvalRequest(run, str(images), which))["accuracy"]
        assert row["linear"]["chosen"] == evaluate_probe("linear", EvalRequest(run, str(images), which))["chosen"]
    assert len({row["effective_rank"] for row in found["rows"].values()}) == 4
    printed = out.export_text()
    assert all(text in printed for text in ("k-NN", "effective rank", *found["rows"], *found["verdict"]))


@pytest.mark.parametrize(
    "knn_target, linear_target, sentence",
    [
        (0.70, 0.80, "Raw pixels still win: k-NN by 10.0 points."),
        (0.70, 0.70, "Raw pixels still win: k-NN by 10.0 points, linear by 5.0 points, BN + linear by 5.0 points."),
        (0.90, 0.90, "Raw pixels win nowhere."),
    ],
)
def test_verdict_says_where_raw_pixels_win(knn_target: float, linear_target: float, sentence: str):
    def row(knn: float, linear: float) -> dict:
        return {"knn": {"accuracy": knn}, "linear": {"accuracy": linear}, "linear_bn": {"accuracy": linear}}

    rows = {
        "raw pixels": row(0.8, 0.75),
        "random encoder": row(0.5, 0.6),
        "target encoder": row(knn_target, linear_target),
    }
    over_random, pixels = table_verdict(rows)
    assert pixels == sentence
    assert f"{100 * (knn_target - 0.5):+.1f} points k-NN" in over_random
