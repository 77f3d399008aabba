"""Counting and depth on CLEVR's own files: labels, whole pictures, the row that comes out, and one sentence for a mistake."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as vision

from fastjepa.cli.main import main
from fastjepa.config.load import config_from_dict
from fastjepa.data.prepare.write_scenes import write_scenes
from fastjepa.errors import UserError
from fastjepa.evals import inputs, linear
from fastjepa.evals.features import extract_features
from fastjepa.evals.inputs import open_subject
from fastjepa.evals.linear import linear_accuracy
from fastjepa.evals.lowlevel import ClevrImages, Squash, evaluate_lowlevel, lowlevel_recipe, open_clevr_splits, squashed_inputs
from fastjepa.evals.request import EvalRequest
from fastjepa.evals.scoring import Features

COUNTS = {"train": 60, "val": 24}
RUN = {
    "data": {"crop_size": 32},
    "mask": {"patch_size": 8},
    "meta": {"model_name": "vit_tiny", "embed_dim": 32, "depth": 4, "num_heads": 2, "pred_depth": 1, "pred_emb_dim": 32},
}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes as `fastjepa data get scenes` lays them out."""
    root = tmp_path_factory.mktemp("rendered")
    write_scenes(root, 32, COUNTS, workers=1)
    return root


@pytest.fixture
def clevr(rendered: Path, tmp_path: Path) -> Path:
    """The same scenes as CLEVR v1.0 lays its own out: images/<split>/, in pictures of 3:2."""
    root = tmp_path / "CLEVR_v1.0"
    shutil.copytree(rendered / "scenes", root / "scenes")
    for split in COUNTS:
        (root / "images" / split).mkdir(parents=True)
        for file in (rendered / split).iterdir():
            Image.open(file).resize((48, 32)).save(root / "images" / split / file.name)
        change(root, split, lambda found: found["info"].pop("renderer"))
    return root


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run that has no checkpoint yet: its untrained encoder and raw pixels can be probed."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(config_from_dict(RUN, "test").to_dict()))  # JSON is YAML
    return tmp_path / "run"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MIN_STEPS", 100)


def change(root: Path, split: str, edit) -> None:
    listing = root / "scenes" / f"CLEVR_{split}_scenes.json"
    found = json.loads(listing.read_text())
    edit(found)
    listing.write_text(json.dumps(found))


def scene(*depths: float) -> dict:
    return {"image_filename": "a.png", "objects": [{"pixel_coords": [1.0, 2.0, depth]} for depth in depths]}


@pytest.mark.parametrize("layout", ["rendered", "clevr"])
def test_labels_are_those_of_the_scene_files(layout: str, request: pytest.FixtureRequest):
    root = request.getfixturevalue(layout)
    for split, length in COUNTS.items():
        listed = json.loads((root / "scenes" / f"CLEVR_{split}_scenes.json").read_text())["scenes"]
        counts, bins = (ClevrImages(root, split, task) for task in ("count", "dist"))
        assert len(counts) == len(bins) == length
        for i, entry in enumerate(listed):
            assert counts.classes[counts.label(i)] == str(len(entry["objects"]))
            depth = min(thing["pixel_coords"][2] for thing in entry["objects"])
            edges = np.array([0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0])
            assert bins.label(i) == np.flatnonzero(edges < depth).max()  # as VTAB writes it
            assert Path(counts.name(i)).name == entry["image_filename"]
            assert counts.read(i) == Path(counts.name(i)).read_bytes()


@pytest.mark.parametrize("depth, bin", [(8, 0), (8.01, 1), (8.5, 1), (9.5, 3), (9.51, 4), (10, 4), (10.01, 5), (100, 5)])
def test_a_bin_holds_its_upper_edge(depth: float, bin: int, clevr: Path):
    change(clevr, "val", lambda found: found.update(scenes=[scene(11, depth, 100)]))
    images = ClevrImages(clevr, "val", "dist")
    assert images.label(0) == bin and len(images.classes) == 6


def test_pictures_are_squashed_and_nothing_is_cut_off():
    picture = torch.zeros(3, 32, 48, dtype=torch.uint8)
    picture[:, :, :6], picture[:, :, -6:] = 200, 100
    found = Squash()(picture, 0, (32, 32))
    assert torch.equal(found, vision.resize(picture, [32, 32], antialias=True))
    assert (found[:, :, 0] == 200).all() and (found[:, :, -1] == 100).all()
    assert torch.equal(Squash(flip=True)(picture, 0, (32, 32)), found.flip(-1))


def test_features_are_those_of_the_squashed_pictures(clevr: Path, run: Path):
    splits, subject = open_clevr_splits(str(clevr), "count", None, 8, 0), open_subject(run)
    train, test = squashed_inputs(subject, "random", splits, flips=True)
    encoder = subject.encoder("random")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in subject.config.mean_std)
    for i in (0, 31, 59):
        picture = torch.from_numpy(np.array(Image.open(splits[0].source.name(i)))).permute(2, 0, 1)
        small = vision.resize(picture, [32, 32], antialias=True)
        for view, pixels in zip(train.views, (small, small.flip(-1)), strict=True):
            expected = encoder.features(((pixels / 255 - mean) / std)[None]).mean(dim=1)[0]
            assert torch.allclose(view[i], expected, atol=1e-4)
    assert torch.equal(train.x, train.views[0]) and len(test.x) == len(test.y) == 8
    assert test.y.tolist() == [splits[1].source.label(int(row)) for row in splits[1].rows]


def test_both_tasks_share_the_cached_features(clevr: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
    made, extract = [], extract_features
    monkeypatch.setattr(inputs, "extract_features", lambda *args, **kw: made.append(1) or extract(*args, **kw))
    found = {}
    for task in ("count", "dist", "count"):
        found[task] = squashed_inputs(open_subject(run), "random", open_clevr_splits(str(clevr), task, None, None, 0))
    assert len(made) == 2
    assert torch.equal(found["count"][0].x, found["dist"][0].x) and not torch.equal(found["count"][0].y, found["dist"][0].y)


@pytest.mark.parametrize("task, classes, encoder", [("count", 8, "random"), ("dist", 6, "random"), ("dist", 6, "pixels")])
def test_a_row_says_what_it_is_of(rendered: Path, run: Path, quick: None, task: str, classes: int, encoder: str):
    row = json.loads(json.dumps(evaluate_lowlevel(EvalRequest(run, str(rendered), encoder, n_train=50, seed=3), task)))
    named = {"checkpoint": str(run), "data": str(rendered), "encoder": encoder, "split": "val", "seed": 3, "task": task}
    assert {key: row[key] for key in named} == named
    assert (row["classes"], row["n_train"], row["n_test"], row["paper"]) == (classes, 50, 24, None)
    assert 0 <= row["ci95"][0] <= row["accuracy"] <= row["ci95"][1] <= 1
    labels = [ClevrImages(rendered, "val", task).label(i) for i in range(24)]
    assert row["chance"] == max(labels.count(label) for label in labels) / 24


def test_the_published_protocol_trains_one_linear_head_as_published(clevr: Path, run: Path):
    row = evaluate_lowlevel(EvalRequest(run, str(clevr), "random"), "count", "published")
    assert row["probe"] == "linear" and row["chosen"] == {"lr": 0.01, "weight_decay": 5e-4}
    assert row["paper"] == {"I-JEPA H/14": 86.7, "MAE H/14": 90.5, "iBOT L/16": 85.7}
    epochs = [lowlevel_recipe("published", task).length(70_000)[0] for task in ("count", "dist")]
    assert epochs == [50, 100] and lowlevel_recipe("published", "dist").nesterov


def test_features_that_hold_the_answer_give_it_and_shuffled_labels_chance(rendered: Path, quick: None):
    splits = open_clevr_splits(str(rendered), "dist", None, None, 0)
    y = torch.tensor([splits[0].source.label(i) for i in range(60)]).repeat(10)
    noise = torch.Generator().manual_seed(0)
    x = torch.nn.functional.one_hot(y, 6) + 0.1 * torch.randn(600, 6, generator=noise)
    assert linear_accuracy(Features(x[:400], y[:400]), Features(x[400:], y[400:]), 6).accuracy > 0.98
    shuffled = y[torch.randperm(600, generator=noise)]
    result = linear_accuracy(Features(x[:400], shuffled[:400]), Features(x[400:], shuffled[400:]), 6)
    assert result.ci95[0] <= float(shuffled[400:].bincount().max() / 200)


@pytest.mark.parametrize(
    "edit, sentence",
    [
        (lambda root: (root / "scenes" / "CLEVR_val_scenes.json").unlink(), "no such file; .* fastjepa data get scenes"),
        (lambda root: (root / "scenes" / "CLEVR_val_scenes.json").write_text('{"info"'), "not a scene file of CLEVR v1.0"),
        (lambda root: change(root, "val", lambda found: found["scenes"][3].pop("objects")), "not a scene file of CLEVR v1.0"),
        (lambda root: change(root, "val", lambda found: found["scenes"].clear()), "lists no scenes"),
        (lambda root: change(root, "val", lambda found: found["scenes"].append(scene(9, 9))), "a.png has 2 objects"),
        (lambda root: change(root, "val", lambda found: found["scenes"].append(scene(9, 9, 0))), "a.png .* at depth 0;"),
        (lambda root: shutil.rmtree(root / "images"), "images/train: no such directory"),
        (lambda root: (root / "images" / "val" / "val_000004.png").unlink(), "val_000004.png: cannot be evaluated"),
        (lambda root: (root / "images" / "val" / "val_000004.png").write_bytes(b"x"), "val_000004.png: cannot be evaluated"),
    ],
)
def test_what_is_wrong_with_the_files_is_one_sentence(clevr: Path, run: Path, edit, sentence: str):
    edit(clevr)
    with pytest.raises((UserError, OSError), match=sentence) as error:
        evaluate_lowlevel(EvalRequest(run, str(clevr), "random"), "dist")
    assert "\n" not in str(error.value)


def test_mistakes_in_arguments_are_named(clevr: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTJEPA_DATA", str(tmp_path / "none"))
    with pytest.raises(UserError, match="run: fastjepa data get scenes"):
        evaluate_lowlevel(EvalRequest(run, "scenes", "random"), "count")
    with pytest.raises(UserError, match="task 'colour' is unknown: choose count or dist"):
        evaluate_lowlevel(EvalRequest(run, str(clevr), "random"), "colour")
    with pytest.raises(UserError, match="protocol 'inat18' is unknown"):
        evaluate_lowlevel(EvalRequest(run, str(clevr), "random"), "count", "inat18")
    with pytest.raises(UserError, match="raw pixels have no layers"):
        evaluate_lowlevel(EvalRequest(run, str(clevr), "pixels", "concat4"), "count")


def test_the_command_prints_a_row_or_a_sentence(clevr: Path, run: Path, quick: None, capsys: pytest.CaptureFixture):
    command = ["eval", "lowlevel", "--checkpoint", str(run), "--data", str(clevr), "--task", "dist", "--encoder", "random"]
    assert main([*command, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["task"], row["encoder"], row["n_test"]) == ("dist", "random", 24)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"{100 * row['accuracy']:.1f} %" in printed and "always the most frequent answer" in printed
    assert "I-JEPA H/14 72.4" in printed
    shutil.rmtree(clevr / "scenes")
    assert main(command) == 2
    assert "CLEVR_train_scenes.json: no such file" in capsys.readouterr().err
