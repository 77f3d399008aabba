"""Training on labels, all or few: the published recipe, splits, resumption, and nothing learned from the test images."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from fastjepa.cli.main import main
from fastjepa.config.load import config_from_dict
from fastjepa.data.sources import open_source
from fastjepa.errors import UserError
from fastjepa.evals.augment import Augment
from fastjepa.evals.cache import weights_fingerprint
from fastjepa.evals.finetune import Classifier, FinetuneOptions, finetune_accuracy, finetune_recipe, layer_decayed_adamw
from fastjepa.evals.inputs import open_splits, open_subject
from fastjepa.evals.linear import standardise
from fastjepa.evals.lowshot import CS, LowshotOptions, evaluate_lowshot, fraction_of, listed_images, logistic_accuracy
from fastjepa.evals.request import EvalRequest
from fastjepa.model.jepa import build_pair
from tests.support.evals import GREY, SMALL, write_images, write_run
from tests.support.features import blobs
from tests.support.places import ROOT

SHORT = {"epochs": 3, "batch": 8, "lrs": (3e-3,)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def encoder():
    return build_pair(config_from_dict(SMALL, "test"))[1]


def test_learning_rates_fall_from_layer_to_layer_and_vectors_are_not_decayed():
    """Two blocks: patch embedding, block 0, block 1, then norm and head: 0.5 to the 3, 2, 1 and 0."""
    classifier = Classifier(encoder(), 10, GREY)
    optimizer = layer_decayed_adamw(classifier, 1.0, weight_decay=0.3, layer_decay=0.5)
    where = {p: group for group in optimizer.param_groups for p in group["params"]}
    named = dict(classifier.named_parameters())
    assert len(where) == len(named)
    for name, parameter in named.items():
        layer = 0 if "patch_embed" in name else int(name.split(".")[2]) + 1 if ".blocks." in name else 3
        assert where[parameter]["lr"] == 0.5 ** (3 - layer), name
        assert where[parameter]["weight_decay"] == (0.3 if parameter.ndim > 1 else 0.0), name


def test_classifier_averages_the_final_normed_patches_and_starts_even():
    plain, pixels = encoder(), torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    classifier = Classifier(encoder(), 10, GREY)
    assert torch.equal(classifier(pixels), torch.zeros(3, 10))
    classifier.head.weight.data = torch.eye(10, 32)
    expected = plain.features((pixels / 255 - 0.5) / 0.25).mean(dim=1)[:, :10]
    assert torch.allclose(classifier(pixels), expected, atol=1e-5)
    assert all(parameter.requires_grad for parameter in classifier.parameters())


@pytest.mark.parametrize(
    "width, n, device, expected",
    [
        (1280, 12800, "cuda", {"lrs": [3e-5], "weight_decay": 0.4, "epochs": 50, "batch": 512, "layer_decay": 0.75}),
        (1024, 1_281_167, "cuda", {"lrs": [3e-5], "weight_decay": 0.05, "epochs": 50, "batch": 512, "layer_decay": 0.75}),
        (192, 500, "cpu", {"lrs": [1e-3], "weight_decay": 0.05, "epochs": 50, "batch": 20, "layer_decay": 0.75}),
        (192, 50000, "cpu", {"lrs": [1e-3], "weight_decay": 0.05, "epochs": 5, "batch": 512, "layer_decay": 0.75}),
    ],
)
def test_recipe_is_the_published_one_where_there_is_one(width: int, n: int, device: str, expected: dict):
    assert dataclasses.asdict(finetune_recipe(FinetuneOptions(), width, n, torch.device(device))) == expected
    given = FinetuneOptions(lrs=[0.5], weight_decay=0.0, epochs=7, batch=3, layer_decay=0.5)
    assert finetune_recipe(given, width, n, torch.device(device)) == given


@pytest.mark.parametrize("channels", [1, 3])
def test_an_augmented_view_is_a_function_of_seed_view_and_image(channels: int):
    noise = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (channels, 40, 30), dtype=torch.uint8, generator=noise)
    for rand_augment in (False, True):
        made = [Augment(0, 1, rand_augment)(image, row, (16, 24)) for row in (5, 6, 5)]
        torch.rand(3)  # the global stream has no part in it
        assert made[0].shape == (channels, 16, 24) and made[0].dtype == torch.uint8
        assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])
        for other in (Augment(1, 1, rand_augment), Augment(0, 2, rand_augment)):
            assert not torch.equal(made[0], other(image, 5, (16, 24)))


def test_half_of_the_views_are_mirrored():
    ramp = torch.arange(0, 240, 10, dtype=torch.uint8).expand(1, 24, 24)
    rising = [bool((made := Augment(0, view)(ramp, 0, (8, 8)))[0, 0, 0] < made[0, 0, -1]) for view in range(200)]
    assert 70 < sum(rising) < 130


def finetuned(run: Path, data: Path, cache: bool = False, **setting):
    one = open_subject(run, "cpu", cache)
    splits = open_splits(str(data), None, None, 0)
    return finetune_accuracy(one, one.encoder("target", splits[0]), splits, FinetuneOptions(**SHORT | setting))[0]


def relabelled(data: Path, root: Path, split: str) -> Path:
    """The same images, those of `split` dealt out to the two classes without regard to what they show."""
    files = sorted(data.rglob("*.png"))
    for file in files:
        label = f"class{hash_of(file) % 2}" if file.parts[-3] == split else file.parts[-2]
        target = root / file.parts[-3] / label / f"{file.parts[-2]}-{file.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return root


def hash_of(file: Path) -> int:
    return int(file.stem) // 2  # neighbours of both classes get the same label


def test_finetuning_learns(run: Path, images: Path):
    assert finetuned(run, images).accuracy > 0.9


def test_permuted_labels_leave_chance(run: Path, tmp_path: Path):
    """Chance is a half; the bound is four standard deviations at 300 test images."""
    data = relabelled(write_images(tmp_path / "data", 80, 300), tmp_path / "shuffled", "train")
    assert abs(finetuned(run, data).accuracy - 0.5) < 0.12


def test_test_labels_do_not_touch_the_choice(run: Path, images: Path, tmp_path: Path):
    wrong = relabelled(images, tmp_path, "test")
    right, other = (finetuned(run, data, lrs=(1e-7, 3e-3)) for data in (images, wrong))
    assert right.chosen == other.chosen == {"lr": 3e-3} and right.validation_accuracy == other.validation_accuracy
    assert right.accuracy > other.accuracy


def test_only_the_copy_is_trained(run: Path, images: Path):
    one = open_subject(run, "cpu", False)
    splits = open_splits(str(images), None, None, 0)
    network = one.encoder("target", splits[0])
    before = weights_fingerprint(network)
    finetune_accuracy(one, network, splits, FinetuneOptions(**SHORT))
    assert weights_fingerprint(network) == before and not any(p.requires_grad for p in network.parameters())


@pytest.mark.slow
def test_a_killed_finetuning_goes_on_after_its_last_epoch(tmp_path: Path, images: Path):
    """Killed with SIGKILL while it trains, then run again: the same row as without."""
    rows = []
    for name, kills in (("whole", 0), ("killed", 1)):
        run = write_run(tmp_path / name)
        words = [
            "eval",
            "finetune",
            "--checkpoint",
            run,
            "--data",
            images,
            "--epochs",
            40,
            "--batch-size",
            4,
            "--device",
            "cpu",
        ]
        command = [sys.executable, "-m", "fastjepa.cli", *map(str, words), "--json"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        for _ in range(kills):
            process = subprocess.Popen(command, cwd=ROOT, env=environment)
            end = time.monotonic() + 120
            while not list(run.glob("unfinished/*/final.pt")) and time.monotonic() < end:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            (state,) = run.glob("unfinished/*/final.pt")
            assert 1 <= torch.load(state, weights_only=True)["epoch"] < 20
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout) | {"checkpoint": None})
        assert not list(run.glob("unfinished/*"))
    assert rows[0] == rows[1]


def ragged(root: Path) -> Path:
    """30 training images of class a, 11 of b, 3 of c."""
    for split in ("train", "test"):
        for label, count in (("a", 30), ("b", 11), ("c", 3)):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (16, 16), 10 * i).save(root / split / label / f"{label}_{i:02}.png")
    return root


@pytest.mark.parametrize("fraction, counts", [(0.01, [1, 1, 1]), (0.2, [6, 2, 1]), (0.5, [15, 6, 2]), (1.0, [30, 11, 3])])
def test_a_share_is_of_each_class_and_drawn_by_its_seed(tmp_path: Path, fraction: float, counts: list[int]):
    source = open_source(ragged(tmp_path))
    rows = fraction_of(source, fraction, seed=0)
    assert np.bincount([source.label(int(row)) for row in rows]).tolist() == counts
    assert np.all(np.diff(rows) > 0) and np.array_equal(rows, fraction_of(source, fraction, seed=0))
    if fraction < 1:
        assert any(not np.array_equal(rows, fraction_of(source, fraction, seed)) for seed in (1, 2))
    for wrong in (0.0, 1.5):
        with pytest.raises(UserError, match="above 0 and at most 1"):
            fraction_of(source, wrong, 0)


def test_a_published_list_names_its_images(tmp_path: Path):
    source, file = open_source(ragged(tmp_path / "data")), tmp_path / "1percent.txt"
    file.write_text("b_03.png\n\na/a_29.png\nc_00.png\n")
    names = [Path(source.name(int(row))).name for row in listed_images(source, file)]
    assert names == ["a_29.png", "b_03.png", "c_00.png"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a_00.png\nz_00.png\n", "z_00.png: no images .* list of this data set"),
        ("same.png\n", "same.png: 2 images .* class/name"),
        ("", "names no images"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str):
    data, file = ragged(tmp_path / "data"), tmp_path / "list.txt"
    for label in "ab":
        Image.new("L", (16, 16)).save(data / "train" / label / "same.png")
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        listed_images(open_source(data), file)
    with pytest.raises(UserError, match="cannot be read as a list"):
        listed_images(open_source(data), tmp_path / "none.txt")


def test_logistic_regression_is_at_its_optimum():
    """scikit-learn's coefficients have no gradient left in the objective, written with torch; C is the one chosen."""
    train, test = blobs(300, spread=1.5), blobs(200, spread=1.5, seed=1)
    result = logistic_accuracy(train, test, 4)
    c = result.chosen["c"]
    x, x_test = (part.double() for part in standardise(train.x, test.x))
    weight, bias = torch.zeros(8, 4).double().requires_grad_(), torch.zeros(4).double().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = c * torch.nn.functional.cross_entropy(x @ weight + bias, train.y, reduction="sum") + weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    assert result.accuracy == float(((x_test @ weight + bias).argmax(dim=1) == test.y).double().mean())
    assert result.validation_accuracy is not None and c in CS
    other = LogisticRegression(C=c, tol=1e-8, max_iter=1000).fit(x.numpy(), train.y.numpy())
    assert np.allclose(other.coef_, (weight - weight.mean(1, keepdim=True)).T.detach(), atol=1e-3)


def test_too_few_images_to_choose_c_is_said(tmp_path: Path, run: Path):
    data = ragged(tmp_path)
    with pytest.raises(UserError, match="no class has 5 training images, .*or give --c"):
        evaluate_lowshot(EvalRequest(run, str(data), cache=False), LowshotOptions(fraction=0.1))
    found = evaluate_lowshot(EvalRequest(run, str(data), cache=False), LowshotOptions(fraction=0.1, c=1.0))
    assert found["chosen"] == {"c": 1.0}


@pytest.mark.parametrize("method, odd", [("logistic", ["--lr", "0.1"]), ("finetune", ["--c", "1"]),
                                         ("finetune", ["--layers", "concat4"])])  # fmt: skip
def test_an_option_of_the_other_method_is_refused(run: Path, images: Path, method: str, odd: list[str], capsys):
    command = ["eval", "lowshot", "--checkpoint", str(run), "--data", str(images), "--method", method, *odd]
    assert main(command) == 2
    assert f"--method {method} has no use for {odd[0][2:]}" in capsys.readouterr().err


def test_commands_give_rows(run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    names = tmp_path / "list.txt"
    names.write_text("".join(f"class{i % 2}/{i:04d}.png\n" for i in range(14)))
    finetuning = ["--epochs", "3", "--batch-size", "8", "--lr", "3e-3"]
    for words, protocol, n in (
        (["lowshot", "--fraction", "0.5"], "logistic", 20),
        (["lowshot", "--split-file", str(names)], "logistic", 14),
        (["lowshot", "--fraction", "0.5", "--method", "finetune", *finetuning], "finetune", 20),
        (["finetune", *finetuning], "finetune", 40),
    ):
        assert main(["eval", *words, "--checkpoint", str(run), "--data", str(images), "--no-cache", "--json"]) == 0
        row = json.loads(capsys.readouterr().out)
        assert (row["probe"], row["protocol"], row["n_train"], row["step"]) == (words[0], protocol, n, 3)
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1] and row["accuracy"] > 0.6
        assert row["split"] == "test" and row["classes"] == 2
