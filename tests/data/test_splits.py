"""Splits by the names of folders and files: what is for validation is never trained on in silence."""

import shutil
from pathlib import Path

import pytest

from fastjepa.data.sources import open_source
from fastjepa.data.splits import splits_of
from fastjepa.errors import UserError
from tests.support.images import pack_shard, save_image

LAYOUTS = {  # folders or beginnings of files: how many images each has, and the images of train, val and test
    ("train", "valid"): (3, 2, 2),
    ("train", "validation"): (3, 2, 2),
    ("Train", "Val"): (3, 2, 2),
    ("TRAIN", "DEV"): (3, 2, 2),
    ("training", "testing", "val"): (3, 1, 2),
    ("train", "eval"): (3, 2, 2),
}


def images(count: int, folder: Path) -> dict[str, bytes]:
    return {f"{i}.png": save_image(folder / "kept" / f"{i}.png", seed=i).read_bytes() for i in range(count)}


def counts(root: Path) -> tuple[int, ...]:
    return tuple(len(open_source(root, split)) for split in ("train", "val", "test"))


@pytest.mark.parametrize("names, expected", LAYOUTS.items(), ids="+".join)
@pytest.mark.parametrize("kind", ["folders", "shards in folders", "shards"])
def test_known_names_are_splits_in_any_case(tmp_path: Path, kind: str, names: tuple[str, ...], expected: tuple[int, ...]):
    for name, count in zip(names, (3, 2, 1), strict=False):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i, (file, raw) in enumerate(images(count, tmp_path).items()):
            (tmp_path / "set" / name / "ab"[i % 2]).mkdir(exist_ok=True)
            (tmp_path / "set" / name / "ab"[i % 2] / file).write_bytes(raw)
        if kind != "folders":
            shutil.rmtree(tmp_path / "set" / name)
            shard = f"{name}/0.tar" if kind == "shards in folders" else f"set-{name}-0.tar"
            (tmp_path / "set" / shard).parent.mkdir(exist_ok=True)
            pack_shard(tmp_path / "set" / shard, images(count, tmp_path))
    if len(names) == 3:
        expected = (3, 1, 2)
    assert counts(tmp_path / "set") == expected
