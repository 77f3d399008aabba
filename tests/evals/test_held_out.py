"""The split that is tested on: the labelled one, its classes matched by name, the same for evaluations and a run's k-NN."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from fastjepa.cli.main import main
from fastjepa.config.load import config_from_dict
from fastjepa.data.sources import open_source
from fastjepa.errors import SplitError, UserError
from fastjepa.evals.inputs import open_splits
from fastjepa.evals.lowshot import fraction_of
from fastjepa.model.jepa import build_pair
from fastjepa.monitoring.monitor import gather_probe
from tests.support.evals import SMALL, write_run
from tests.support.images import pack_shard

Labels = list[str | None]  # class names of the images of a split; None: an image without a label
KINDS = ("folders", "shards", "parquet")
TRAINED: Labels = ["ant", "bee", "cow"] * 4


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((16, 16), 10 * number % 256, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_split(root: Path, kind: str, split: str, labels: Labels) -> None:
    """Images with these labels, as class folders, shards with numbers in .cls, or Parquet with names in its schema.

    A split numbers the classes that it has, but for shards, which have numbers alone: there "ant" is 0, "bee" 1, "cow" 2.
    """
    names = sorted({label for label in labels if label})
    if kind == "folders":
        for i, label in enumerate(labels):
            (root / split / (label or "")).mkdir(parents=True, exist_ok=True)
            (root / split / (label or "") / f"{i}.png").write_bytes(png(i))
    elif kind == "shards":
        (root / split).mkdir(parents=True)
        files = {}
        for i, label in enumerate(labels):
            files[f"{i}.png"] = png(i)
            files |= {f"{i}.cls": str("abcdefgh".index(label[0])).encode()} if label else {}
        pack_shard(root / split / "0.tar", files)
    else:
        root.mkdir(exist_ok=True)
        numbers = pa.array([names.index(label) if label else -1 for label in labels], pa.int64())
        images = [{"bytes": png(i), "path": None} for i in range(len(labels))]
        schema = {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}
        table = pa.table({"image": images, "label": numbers}).replace_schema_metadata(schema if names else {})
        parquet.write_table(table, root / f"{split}-00000-of-00001.parquet")


def write_splits(root: Path, kind: str, **splits: Labels) -> str:
    for split, labels in splits.items():
        write_split(root, kind, split, labels)
    return str(root)


def config(data: str):
    return config_from_dict(SMALL | {"data": SMALL["data"] | {"source": data}, "runtime": {"dtype": "fp32"}}, "test")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("absent", ["ant", "bee", "cow"])
def test_a_split_without_a_class_is_matched_by_name(tmp_path: Path, capsys, kind: str, absent: str):
    """Whether the class sorts first, between or last; shards have numbers for names."""
    tested = [label for label in ["cow", "ant", "bee", "ant"] if label != absent]
    data = write_splits(tmp_path / "set", kind, train=TRAINED, val=tested)
    train, test = open_splits(data, None, None, 0)
    named = {"ant": "0", "bee": "1", "cow": "2"} if kind == "shards" else {label: label for label in TRAINED}
    found = [train.source.classes[test.source.label(int(row))] for row in test.rows]
    assert sorted(found) == sorted(named[label] for label in tested) and test.name == "val"
    said = "".join(capsys.readouterr().err.split())  # lines break between words, and where depends on the folder's name
    assert f"itsvalsplithasnoimagesofclass'{named[absent]}'" in said
    probe = gather_probe(config(data), train.source)
    assert sorted(probe.query_labels.tolist()) == sorted("abc".index(label[0]) for label in tested)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unlabelled_test_split_does_not_hide_a_labelled_val_split(tmp_path: Path, capsys, kind: str):
    """ImageNet's layout: test/ has images alone, in Parquet with label -1."""
    data = write_splits(tmp_path / "set", kind, train=TRAINED, val=["ant", "bee", "cow"], test=[None] * 5)
    train, test = open_splits(data, None, None, 0)
    said = " ".join(capsys.readouterr().err.split())
    assert test.name == "val" and len(test.rows) == 3
    assert "tests on its val split, for the images of its test split have no labels" in said
    probe = gather_probe(config(data), train.source)
    assert probe.about.startswith("a k-NN of 3 val images (") and "tests on its val split" in probe.about
    assert open_splits(data, None, None, 0, "val")[1].name == "val" and "tests on" not in capsys.readouterr().err
    with pytest.raises(UserError, match="its test split have no labels; give them labels"):
        open_splits(data, None, None, 0, "test")


@pytest.mark.parametrize("splits", [{"val": ["ant"], "test": ["bee"]}, {"test": ["bee"]}, {"val": ["ant"]}])
def test_one_choice_serves_evaluations_and_the_run(tmp_path: Path, splits: dict[str, Labels]):
    """Test where it has labels, else val."""
    data = write_splits(tmp_path / "set", "folders", train=TRAINED, **splits)
    train, test = open_splits(data, None, None, 0)
    probe = gather_probe(config(data), train.source)
    assert test.name == ("test" if "test" in splits else "val") and probe.about == (
        f"a k-NN of 1 {test.name} images ({data}: its {test.name} split has no images of 2 classes "
        f"({', '.join(repr(name) for name in train.source.classes if name not in splits[test.name])}))"
    )
    assert probe.query_labels.tolist() == [test.source.label(int(test.rows[0]))]
    for split in ("val", "test"):
        if split in splits:
            assert open_splits(data, None, None, 0, split)[1].name == split
        else:
            with pytest.raises(SplitError, match=f"has no {split} split"):
                open_splits(data, None, None, 0, split)


@pytest.mark.parametrize("kind", ["folders", "parquet"])
@pytest.mark.parametrize("stranger", ["aardvark", "bat", "zebra"])
def test_a_class_without_training_images_is_refused_by_name_wherever_it_sorts(tmp_path: Path, kind: str, stranger: str):
    data = write_splits(tmp_path / "set", kind, train=TRAINED, test=["ant", "cow", stranger])
    with pytest.raises(UserError, match=f"its test split are of class '{stranger}' without training images; .* take those"):
        open_splits(data, None, None, 0)
    probe = gather_probe(config(data), open_source(data))
    assert probe.about.startswith("a k-NN of 4 other training images (") and stranger in probe.about
    write_split(tmp_path / "set", kind, "val", ["ant"])
    assert open_splits(data, None, None, 0)[1].name == "val"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels, known", [(["ant"] * 6, "1 class,"), ([None] * 6, "0 classes,")])
def test_fewer_than_two_classes_are_refused(tmp_path: Path, kind: str, labels: Labels, known: str):
    data = write_splits(tmp_path / "set", kind, train=labels, val=labels[:2])
    with pytest.raises(UserError, match=f"labels of {known} and a probe needs two"):
        open_splits(data, None, None, 0)
    assert gather_probe(config(data), open_source(data)).about.startswith(
        "no k-NN, for there are no labelled images of two classes"
    )


def test_images_without_labels_among_labelled_ones_are_left_out_and_counted(tmp_path: Path, monkeypatch, capsys):
    data = write_splits(tmp_path / "set", "folders", train=TRAINED, val=TRAINED)
    source = open_source(data)
    monkeypatch.setattr(type(source), "label", lambda self, i: None if i in (0, 5) else i % 3)
    train, test = open_splits(data, None, None, 0)
    assert [len(split.rows) for split in (train, test)] == [10, 10] and not {0, 5} & {*train.rows, *test.rows}
    said = " ".join(capsys.readouterr().err.split())
    assert "2 of the 12 training images have no label and are left out" in said and "2 of the 12 images of its val" in said
    assert not {0, 5} & set(fraction_of(source, 1.0, 0).tolist())
    probe = gather_probe(config(data), source)
    assert len(probe.queries) == 10 and (probe.bank_labels < 0).sum() == 2
    assert 0 <= probe.read(build_pair(config(data))[1], config(data), torch.device("cpu"))["knn"] <= 1


@pytest.mark.parametrize("count", [1, 2])
def test_classes_of_one_or_two_images_give_no_reading_that_is_not_a_number(tmp_path: Path, count: int):
    """Two images leave none for a k-NN to classify; four leave one."""
    data = write_splits(tmp_path / "set", "folders", train=["ant", "bee"] * count)
    settings, source = config(data), open_source(data)
    found = gather_probe(settings, source).read(build_pair(settings)[1], settings, torch.device("cpu"))
    assert all(np.isfinite(value) for value in found.values()) and ("knn" in found) == (count == 2)


def test_the_command_takes_a_split(tmp_path: Path, capsys):
    run, data = write_run(tmp_path / "run"), write_splits(tmp_path / "set", "folders", train=TRAINED, val=["cow"], test=["ant"])
    asked = ["eval", "knn", "--checkpoint", str(run), "--data", data, "--k", "1", "--json"]
    assert main([*asked, "--split", "val"]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "val"
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "test"


def test_every_evaluation_takes_few_images_of_a_long_tail(tmp_path: Path, capsys):
    """A draw without regard to classes misses those of one and two images, and then no probe can be tested on them."""
    run, labels = write_run(tmp_path / "run"), ["ant"] * 30 + ["bee"] * 10 + ["cow"] * 2 + ["dog"]
    data = write_splits(tmp_path / "set", "folders", train=labels, test=["ant", "bee", "cow", "dog"])
    few = ["--checkpoint", str(run), "--data", data, "--n-train", "12", "--no-cache", "--device", "cpu"]
    for kind in (["knn", "--k", "1"], ["linear", "--lr", "0.1", "--weight-decay", "0"], ["attentive", "--epochs", "1"],
                 ["finetune", "--epochs", "1"]):  # fmt: skip
        assert main(["eval", *kind, *few]) == 0, kind
    capsys.readouterr()
    for kind, remedy in (["knn", "`eval knn` --k"], ["linear", "one --lr and one --weight-decay"]):
        assert main(["eval", kind, *few, "--n-train", "4"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert remedy in said and "the fewest that settings are chosen on" in said
    assert main(["eval", "knn", *few, "--n-train", "3"]) == 2
    assert "3 training images of 4 classes, and each class needs one: use 4 or more (--n-train)" in " ".join(
        capsys.readouterr().err.split()
    )
