"""Splits by the names of folders and files: what is for validation is never trained on in silence."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from fastjepa.data.sources import open_source
from fastjepa.errors import UserError
from tests.support.images import encoded, pack_shard

# Names of folders or files with 3, 2 and 1 images, and how many images are those of train, val and test.
LAYOUTS = {
    "train valid": (3, 2, 2),
    "train validation": (3, 2, 2),
    "train val test": (3, 2, 1),
    "Train Val": (3, 2, 2),
    "TRAIN DEV": (3, 2, 2),
    "training testing dev": (3, 1, 2),
    "Train eval": (3, 2, 2),
    "train evaluation unlabeled": (3, 2, 2),
}


def write_folder(place: Path, count: int) -> None:
    for i in range(count):
        (place / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (place / "ab"[i % 2] / f"{i}.png").write_bytes(encoded(i))


def write_shard(place: Path, count: int) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    pack_shard(place.with_name(f"{place.name}.tar"), {f"{i}.png": encoded(i) for i in range(count)})


def write_table(place: Path, count: int) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({"image": [encoded(i) for i in range(count)]}), place.with_name(f"{place.name}.parquet"))


KINDS = {
    "folders": lambda root, name, count: write_folder(root / name, count),
    "shards in folders": lambda root, name, count: write_shard(root / name / f"{name}-0", count),
    "Parquet in folders": lambda root, name, count: write_table(root / name / f"test-of-{name}-0", count),
    "shards": lambda root, name, count: write_shard(root / f"my-set_{name}2-000", count),
    "Parquet": lambda root, name, count: write_table(root / "data" / f"{name}-00000-of-00001", count),
}


def write(root: Path, kind: str, names: str) -> None:
    for name, count in zip(names.split(), (3, 2, 1), strict=False):
        KINDS[kind](root, name, count)


def counts(where: Path | str) -> tuple[int, ...]:
    return tuple(len(open_source(where, split)) for split in ("train", "val", "test"))


@pytest.mark.parametrize("names", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_known_names_are_splits_in_any_case(tmp_path: Path, kind: str, names: str):
    write(tmp_path, kind, names)
    assert counts(tmp_path) == LAYOUTS[names]
    assert not {"train", "val", "valid", "Train"} & set(open_source(tmp_path).classes)


@pytest.mark.parametrize("kind, pattern", [("shards", "*.tar"), ("shards", "*_{train,valid}2*.tar"), ("Parquet", "data/*")])
def test_a_glob_of_several_splits_is_split(tmp_path: Path, kind: str, pattern: str):
    write(tmp_path, kind, "train valid")
    assert counts(f"{tmp_path}/{pattern}") == (3, 2, 2)


def test_files_of_one_split_that_are_named_are_what_is_meant(tmp_path: Path):
    write(tmp_path, "shards", "train valid")
    assert len(open_source(f"{tmp_path}/*valid*.tar")) == len(open_source(tmp_path / "my-set_valid2-000.tar")) == 2


@pytest.mark.parametrize("kind", ["shards", "Parquet"])
def test_files_for_validation_alone_are_not_trained_on(tmp_path: Path, kind: str):
    write(tmp_path, kind, "validation test")
    with pytest.raises(UserError, match=r"has no train split; name its files train-\*\.\w+, or give those to use"):
        open_source(tmp_path)
    assert [len(open_source(tmp_path, split)) for split in ("val", "test")] == [3, 2]


def test_files_that_no_split_names_are_told(tmp_path: Path, caplog):
    write(tmp_path, "shards", "train valid extra")
    assert counts(tmp_path) == (3, 2, 2)
    assert "1 files that no split names are passed over (my-set_extra2-000.tar)" in caplog.text


def test_what_lies_in_no_split_is_told(tmp_path: Path, caplog):
    write(tmp_path, "folders", "train val unlabeled")
    (tmp_path / "stray.png").write_bytes(encoded(0))
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"")
    (tmp_path / "README.md").write_text("about")
    assert counts(tmp_path) == (3, 2, 2)
    assert caplog.messages[0] == f"{tmp_path}: passed over, as they lie in none of its splits: unlabeled/, " + ", ".join(
        sorted((".png 1", ".tar 1"), key=caplog.messages[0].find)
    )


@pytest.mark.parametrize("names", ["val valid train", "Train train val"])
def test_two_folders_of_one_split_are_refused(tmp_path: Path, names: str):
    write(tmp_path, "folders", names)
    with pytest.raises(UserError, match=r"(Train and train are both its train|val and valid are both its val) split; keep one"):
        counts(tmp_path)


WARNED = {
    "train2017 val2017": "'train2017', 'val2017' look like splits",
    "training_set test_set": "'test_set', 'training_set' look like splits",
    "seg_train seg_test seg_pred": "'seg_test', 'seg_train' look like splits",
    "TrainImages ValImages": "'TrainImages', 'ValImages' look like splits",
    "trainval test": "'test', 'trainval' look like splits",
    "valid test": "'test', 'valid' look like splits",
    "Validation": "'Validation' look like splits",
    "train bus car": "",  # vehicles
    "cat dog": "",
    "trainers testudo dev": "",
}


@pytest.mark.parametrize("names", WARNED)
def test_classes_that_look_like_splits_are_named(tmp_path: Path, names: str, caplog):
    write(tmp_path, "folders", names)
    source = open_source(tmp_path)
    assert len(source) == sum((3, 2, 1)[: len(names.split())]) and set(source.classes) == set(names.split())
    said = [record.getMessage() for record in caplog.records]
    assert [WARNED[names] in line for line in said] == ([True] if WARNED[names] else [])


def test_a_hidden_folder_is_no_class(tmp_path: Path):
    write(tmp_path, "folders", "train")
    (tmp_path / ".cache").mkdir()
    shutil.copytree(tmp_path / "train", tmp_path / ".Trash" / "val")
    assert open_source(tmp_path).classes == ("a", "b")
