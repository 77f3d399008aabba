"""Rows that name their origin, several data sets in one table, other layers and sizes, and mismatches in one sentence."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from fastjepa.cli.main import main
from fastjepa.config.load import config_from_dict
from fastjepa.data.pixels import Pixels
from fastjepa.data.sources import open_source
from fastjepa.errors import CheckpointError, UserError
from fastjepa.evals import linear
from fastjepa.evals.features import check_encoder_input, extract_features, raw_pixels
from fastjepa.evals.images import EvalImages
from fastjepa.evals.inputs import open_splits, open_subject
from fastjepa.evals.knn import Neighbours, knn_accuracy
from fastjepa.evals.published import published_for
from fastjepa.evals.request import EvalRequest
from fastjepa.evals.table import TABLE_ROWS, ProbeOptions, evaluate_probe, probe_recipe
from fastjepa.evals.transfer import evaluate_transfer
from fastjepa.files import write_atomic
from fastjepa.model.jepa import build_pair
from fastjepa.weights.read import load_encoder
from tests.support.evals import GREY, SMALL, write_images, write_run

DEEP = SMALL | {"meta": SMALL["meta"] | {"depth": 5}}
KINDS = ("knn", "linear", "linear_bn", "attentive", "lowshot", "finetune", "transfer", "table")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MIN_STEPS", 100)


def deep():
    """An encoder of five blocks whose final norm does something."""
    encoder = build_pair(config_from_dict(DEEP, "test"))[1]
    encoder.norm.weight.data.mul_(2).add_(torch.arange(32) / 32)
    return encoder


def test_concat4_is_the_final_norm_of_the_last_four_blocks_each_averaged(images: Path):
    images, encoder = EvalImages(open_source(images), (16, 16), Pixels(1)), deep()
    found = extract_features(encoder, images, GREY, "concat4")
    assert found.x.shape == (40, 4 * 32)
    last = extract_features(encoder, images, GREY)
    assert torch.equal(found.x[:, -32:], last.x)
    for dropped, place in ((3, 0), (1, 2)):
        shallow = deep()
        shallow.blocks = shallow.blocks[:-dropped]  # an encoder that ends there
        expected = extract_features(shallow, images, GREY).x
        assert torch.allclose(found.x[:, 32 * place : 32 * (place + 1)], expected, atol=1e-5)
    assert not any(block._forward_hooks for block in encoder.blocks)


def test_concat4_of_too_few_blocks_is_refused(run: Path, images: Path):
    with pytest.raises(UserError, match="--layers concat4: the encoder has 2 blocks; use --layers last"):
        evaluate_probe("linear", EvalRequest(run, str(images), layers="concat4", cache=False))


def test_views_are_augmented_training_images_and_never_test_images(run: Path, images: Path, monkeypatch):
    splits, one = open_splits(str(images), None, None, 0), open_subject(run)
    plain, plain_test = one.features("target", splits)
    train, test = one.features("target", splits, n_views=2)
    assert torch.equal(train.x, plain.x) and torch.equal(test.x, plain_test.x) and test.views == ()
    assert len(train.views) == 2 and not torch.equal(*train.views) and not torch.equal(train.views[0], plain.x)
    assert len(list((run / "features").iterdir())) == 4
    again, _ = one.features("target", splits, n_views=2)
    assert all(map(torch.equal, again.views, train.views))
    other, _ = one.features("target", splits, n_views=1, seed=1)
    assert not torch.equal(other.views[0], train.views[0])


def test_row_names_where_it_comes_from(run: Path, images: Path):
    request = EvalRequest(run, str(images), "context", n_train=30, seed=4)
    row = evaluate_probe("linear", request, ProbeOptions(protocol="cifar100", n_views=1))
    expected = {"checkpoint": str(run / "checkpoints" / "jepa-00000003"), "step": 3, "encoder": "context", "seed": 4,
                "data": str(images), "split": "test", "classes": 2, "image_size": [16, 16], "probe": "linear",
                "layers": "last", "protocol": "cifar100", "views": 1, "n_train": 30, "n_test": 20}  # fmt: skip
    assert expected.items() <= row.items()
    (images / "test").rename(images / "val")
    try:
        assert evaluate_probe("knn", EvalRequest(run, str(images)))["split"] == "val"  # which stands in for test
    finally:
        (images / "val").rename(images / "test")


def test_pixels_are_an_encoder_of_their_own(run: Path, images: Path):
    row = evaluate_probe("knn", EvalRequest(run, str(images), "pixels"), ProbeOptions(k=5, temperature=0.5))
    train, test = (raw_pixels(EvalImages(open_source(images, split), (16, 16), Pixels(1)), GREY) for split in ("train", "test"))
    expected = knn_accuracy(train, test, 2, vote=Neighbours(5, 0.5))
    assert (row["accuracy"], row["chosen"]) == (expected.accuracy, {"k": 5, "temperature": 0.5})
    with pytest.raises(UserError, match="raw pixels have neither layers nor views"):
        evaluate_probe("linear", EvalRequest(run, str(images), "pixels"), ProbeOptions(n_views=1))


def test_another_size_is_seen_at_that_size(run: Path, images: Path):
    one = open_subject(run, cache=False, image_size=24)
    train, _ = one.features("target", open_splits(str(images), None, None, 0))
    expected = extract_features(load_encoder(run), EvalImages(open_source(images), (24, 24), Pixels(1)), GREY)
    assert torch.equal(train.x, expected.x)
    with pytest.raises(UserError, match="18x18 pixels do not divide into 4x4 patches"):
        evaluate_probe("knn", EvalRequest(run, str(images), image_size=18))


def test_colours_that_a_grey_encoder_cannot_see_are_mentioned(run: Path, images: Path, tmp_path: Path, capsys):
    one = open_subject(run, cache=False)
    one.encoder("target", open_splits(str(images), None, None, 0)[0])
    assert capsys.readouterr().err == ""
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "colour" / split / label).mkdir(parents=True)
            Image.new("RGB", (16, 16), (200, 10, 10)).save(tmp_path / "colour" / split / label / "0.png")
    one.encoder("target", open_splits(str(tmp_path / "colour"), None, None, 0)[0])
    assert "colour images are seen in grey" in " ".join(capsys.readouterr().err.split())


def test_an_encoder_that_is_not_as_its_config_says_is_refused(run: Path, images: Path):
    """Weights of three channels under a config of one."""
    wide = config_from_dict(SMALL | {"data": SMALL["data"] | {"channels": 3, "mean": None, "std": None}}, "test")
    assert check_encoder_input(build_pair(wide)[1], (16, 16), 3) is None
    with pytest.raises(UserError, match="takes 3-channel images, not 1"):
        check_encoder_input(build_pair(wide)[1], (16, 16), 1)


def test_grids_of_a_protocol_can_be_given():
    given = probe_recipe("imagenet", lrs=[0.5], weight_decays=None)
    assert given.lrs == (0.5,) and given.weight_decays == (0.0, 5e-4) and given.lars
    with pytest.raises(UserError, match="protocol 'imagnet' is unknown: choose default or imagenet"):
        probe_recipe("imagnet")


@pytest.mark.parametrize(
    "data, classes, known",
    [
        ("/data/cifar100", 100, 87.5),
        ("/data/CIFAR-100/", 100, 87.5),
        ("places205", 205, 58.4),
        ("/x/inat18", 8142, 47.6),
        ("clevr_count", 8, 86.7),
        ("/x/clevr-dist", 6, 72.4),
        ("/data/cifar100", 20, None),  # its coarse labels
        ("cifar10", 10, None),
    ],
)
def test_the_papers_numbers_belong_to_its_data_sets(data: str, classes: int, known: float | None):
    found = published_for(data, classes)
    assert (found and found.ijepa_h14) == known


def test_transfer_puts_data_sets_side_by_side(run: Path, images: Path, tmp_path: Path):
    known = write_images(tmp_path / "clevr-dist", train=60, test=30, classes=6)
    out = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    found = evaluate_transfer([EvalRequest(run, str(data), "context") for data in (images, known)], out=out)
    assert json.loads((run / "transfer.json").read_text()) == found
    plain, clevr = found["rows"]
    assert (plain["data"], plain["classes"], plain["protocol"], plain["paper"]) == (str(images), 2, "default", None)
    assert clevr["paper"] == {"I-JEPA H/14": 72.4, "MAE H/14": 72.4, "iBOT L/16": 62.8}
    for row in found["rows"]:
        assert row["step"] == 3 and row["encoder"] == "context"
        for kind in ("knn", "linear", "linear_bn"):
            alone = evaluate_probe(kind, EvalRequest(run, row["data"], "context"))
            assert (row[kind]["accuracy"], row[kind]["ci95"]) == (alone["accuracy"], alone["ci95"])
    printed = out.export_text()
    assert all(text in printed for text in ("I-JEPA", "iBOT", "L/16", "72.4", "62.8", "BN + linear"))


def test_a_mistake_in_the_last_data_set_shows_before_any_work(run: Path, images: Path):
    with pytest.raises(UserError, match="neither a directory nor a data set's name"):
        evaluate_transfer([EvalRequest(run, data) for data in (str(images), "/no/such")])
    assert not (run / "features").exists()


def test_weights_outside_of_a_run_leave_no_results_beside_them(run: Path, images: Path, tmp_path: Path, monkeypatch):
    """Features then lie with the data sets; a lone checkpoint is read only."""
    monkeypatch.setenv("FASTJEPA_DATA", str(tmp_path / "named"))
    lone = (run / "checkpoints" / "jepa-00000003").rename(tmp_path / "jepa-00000003")
    before = sorted(lone.iterdir())
    found = evaluate_transfer([EvalRequest(lone, str(images))], out=Console(quiet=True))
    assert sorted(lone.iterdir()) == before and list((tmp_path / "named" / "features").iterdir())
    assert found["rows"][0]["checkpoint"] == str(lone)


def test_an_untrained_run_has_no_step(images: Path, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(json.dumps(SMALL))
    row = evaluate_probe("knn", EvalRequest(tmp_path, str(images), "random"))
    assert row["step"] is None and row["checkpoint"] == str(tmp_path)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        evaluate_probe("knn", EvalRequest(tmp_path, str(images)))


def test_unfinished_work_is_found_by_all_that_shapes_it_and_removed_at_a_good_end(run: Path):
    one = open_subject(run, "cpu")
    with pytest.raises(KeyboardInterrupt), one.unfinished({"lr": 1}) as states:
        write_atomic(states("final"), b"half")
        raise KeyboardInterrupt
    with one.unfinished({"lr": 2}) as states:
        assert not states("final").exists()
    with one.unfinished({"lr": 1}) as states:
        assert states("final").read_bytes() == b"half"
    assert not list((run / "unfinished").iterdir())
    with open_subject(run, "cpu", cache=False).unfinished({"lr": 1}) as states:
        assert states("final") is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_shows_examples(kind: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        main(["eval", kind, "--help"])
    assert stop.value.code == 0
    assert f"fastjepa eval {kind}" in capsys.readouterr().out.partition("example")[2]


def test_commands_take_their_options(run: Path, images: Path, capsys: pytest.CaptureFixture):
    for words, said in (
        (["knn", "--k", "3", "--temperature", "0.2"], {"chosen": {"k": 3, "temperature": 0.2}}),
        (["linear", "--lr", "0.1", "--weight-decay", "0", "--views", "1"], {"chosen": {"lr": 0.1, "weight_decay": 0.0}}),
        (["linear_bn", "--protocol", "cifar100", "--seed", "3"], {"protocol": "cifar100", "seed": 3}),
        (["knn", "--encoder", "pixels", "--image-size", "20"], {"encoder": "pixels", "image_size": [20, 20]}),
    ):
        assert main(["eval", *words, "--checkpoint", str(run), "--data", str(images), "--json"]) == 0
        assert said.items() <= json.loads(capsys.readouterr().out).items()
    assert main(["eval", "transfer", "--checkpoint", str(run), "--data", str(images), str(images), "--n-train", "24"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count(images.name) == 2 and " ".join(printed.err.split()).count("24 training images of 2 classes") == 2
    assert main(["eval", "table", "--checkpoint", str(run), "--data", str(images), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["rows"]) == set(TABLE_ROWS)
