"""Directories as people have them: metadata, strays, archives left behind. The wrong file never decides."""

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from fastjepa.cli.main import main
from fastjepa.data.sources import open_source
from fastjepa.errors import UserError
from tests.support.images import encoded, pack_shard, write_idx_pairs


def jpegs(count: int, first: int = 0) -> dict[str, bytes]:
    return {f"{i:04d}.jpg": encoded(i, "JPEG") for i in range(first, first + count)}


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)


def write_metadata(path: Path, rows: int, **columns) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{i:04d}.jpg" for i in range(rows)]
    parquet.write_table(pa.table({"file_name": names, "text": names} | columns), path)


def write_images(path: Path, rows: int) -> None:
    parquet.write_table(pa.table({"image": [encoded(i) for i in range(rows)]}), path)


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def img2dataset(root: Path) -> None:
    """Two shards as img2dataset writes them with output_format="webdataset"."""
    for number in range(2):
        texts = {f"{i:04d}.{ending}": b"{}" for i in range(number * 5, number * 5 + 5) for ending in ("txt", "json")}
        root.mkdir(exist_ok=True)
        pack_shard(root / f"0000{number}.tar", jpegs(5, number * 5) | texts)
        write_metadata(root / f"0000{number}.parquet", 5, sha256=["ab"] * 5, width=[256] * 5)
        (root / f"0000{number}_stats.json").write_text(json.dumps({"count": 5}))


def test_the_output_of_img2dataset_is_its_shards(tmp_path: Path, caplog):
    img2dataset(tmp_path)
    for where in (tmp_path, f"{tmp_path}/*"):
        source = open_source(where)
        assert [source.name(i).rpartition("/")[2] for i in range(len(source))] == list(jpegs(10))
    assert said(caplog) == [f"{tmp_path}: 4 files of other kinds passed over (.parquet 2, .json 2)"]


@pytest.mark.parametrize("place", ["metadata.parquet", "train/metadata.parquet", "data/metadata.parquet"])
def test_an_imagefolder_with_a_table_is_its_images(tmp_path: Path, place: str):
    for split, count in (("train", 4), ("validation", 2)):
        write_files(tmp_path / split / "a", jpegs(count))
        write_files(tmp_path / split / "b", jpegs(1))
    write_metadata(tmp_path / place, 6)
    assert [len(open_source(tmp_path, split)) for split in ("train", "val")] == [5, 3]
    assert open_source(tmp_path).classes == ("a", "b")


def test_a_table_beside_tables_of_images_is_passed_over(tmp_path: Path, caplog):
    write_images(tmp_path / "train-0.parquet", 3)
    write_metadata(tmp_path / "a_metadata.parquet", 3)
    assert len(open_source(tmp_path)) == 3
    assert said(caplog) == [f"{tmp_path}: 1 file of other kinds passed over (.parquet 1)"]


def test_tables_alone_are_told_what_they_lack(tmp_path: Path):
    write_metadata(tmp_path / "metadata.parquet", 3)
    with pytest.raises(UserError, match="which of the columns file_name, text holds the images"):
        open_source(tmp_path)


STRAYS = {  # what lies beside 30 JPEGs
    "a tar of images": (lambda root: pack_shard(root / "z.tar", jpegs(4)), "and 4 images in 1 tar shards (z.tar) lie in it"),
    "a tar without images": (lambda root: pack_shard(root / "z.tar", {"a.txt": b"x"}), ".tar 1"),
    "an empty tar": (lambda root: pack_shard(root / "z.tar", {}), ".tar 1"),
    "what is no tar": (lambda root: (root / "z.tar").write_bytes(b"x" * 2000), "z.tar: not a tar shard .* 30 image files"),
    "a folder named as a tar": (lambda root: (root / "z.tar").mkdir(), ""),
    "a folder named as a table": (lambda root: (root / "out.parquet").mkdir(), ""),
    "a note on idx files": (lambda root: (root / "train-images-idx3-ubyte.txt").write_text("about"), ".txt 1"),
    "another's idx file": (lambda root: (root / "my-images-idx3-ubyte").write_bytes(b"x"), "no ending 1"),
    "a folder named as idx files": (lambda root: (root / "train-images-idx3-ubyte").mkdir(), ""),
    "a table": (lambda root: write_metadata(root / "metadata.parquet", 30), ".parquet 1"),
    "a table of images": (lambda root: write_images(root / "a.parquet", 1),
                          "30 image files and 1 images in 1 Parquet files (a.parquet) lie in it"),
    "shards further down": (lambda root: (root / "more").mkdir() or pack_shard(root / "more/z.tar", jpegs(4)), ".tar 1"),
}  # fmt: skip


@pytest.mark.parametrize("stray", STRAYS)
def test_a_stray_beside_images_does_not_count(tmp_path: Path, stray: str, caplog):
    write_files(tmp_path, jpegs(30))
    put, says = STRAYS[stray]
    put(tmp_path)
    source = open_source(tmp_path)
    assert sorted(Path(source.name(i)).name for i in range(len(source))) == list(jpegs(30))
    pattern = says if ".*" in says else re.escape(says)
    assert re.search(pattern, "\n".join(said(caplog))) and bool(said(caplog)) == bool(says)


def test_data_check_takes_what_a_run_takes(tmp_path: Path, capsys):
    write_files(tmp_path, jpegs(30))
    for stray in ("a tar of images", "a table", "a note on idx files", "a folder named as idx files"):
        STRAYS[stray][0](tmp_path)
    assert main(["data", "check", str(tmp_path), "--workers", "1"]) == 0
    assert "30 images read" in capsys.readouterr().out


def test_a_stray_image_beside_shards_does_not_count(tmp_path: Path, caplog):
    pack_shard(tmp_path / "0.tar", jpegs(9))
    write_files(tmp_path, {"logo.png": encoded(0)})
    (tmp_path / "README.md").write_text("about")
    assert len(open_source(tmp_path)) == 9
    assert said(caplog) == [f"{tmp_path}: 9 images in 1 tar shards (0.tar) and 1 image files lie in it; the first are used, "
                            "the others passed over", f"{tmp_path}: 1 file of other kinds passed over (.md 1)"]  # fmt: skip


MIXTURES = {
    "files and a shard": (lambda root: pack_shard(root / "0.tar", jpegs(8)), "8 images in 1 tar .* 8 image files"),
    "files and a table": (lambda root: write_images(root / "a.parquet", 20), "20 images in 1 Parquet .* 8 image files"),
    "files and idx files": (lambda root: write_idx_pairs(root), "8 images in idx files and 8 image files"),
}  # fmt: skip


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_real_mixture_is_refused_with_both_counts(tmp_path: Path, mixture: str):
    write_files(tmp_path / "a", jpegs(8))
    put, counts = MIXTURES[mixture]
    put(tmp_path)
    with pytest.raises(
        UserError, match=f"^{tmp_path}: {counts}.* lie in it; move one kind elsewhere, or name the files of one"
    ):
        open_source(tmp_path)


def test_shards_and_tables_of_images_are_a_mixture(tmp_path: Path):
    pack_shard(tmp_path / "0.tar", jpegs(8))
    write_images(tmp_path / "a.parquet", 8)
    for where in (tmp_path, f"{tmp_path}/*"):
        with pytest.raises(UserError, match="8 images in 1 Parquet files .* and 8 images in 1 tar shards .*; move one kind"):
            open_source(where)
    assert len(open_source(f"{tmp_path}/*.tar")) == 8


def test_archives_of_the_class_folders_are_passed_over(tmp_path: Path, caplog):
    """ImageNet's training archive holds an archive a class; the labels are those of the folders they were unpacked to."""
    for number, name in enumerate(("n01440764", "n01443537", "n01484850")):
        write_files(tmp_path / "train" / name, jpegs(4, 4 * number))
        write_files(tmp_path / "val" / name, jpegs(1))
        pack_shard(tmp_path / "train" / f"{name}.tar", jpegs(4, 4 * number))
    source = open_source(tmp_path)
    assert [source.label(i) for i in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert source.classes == ("n01440764", "n01443537", "n01484850")
    assert f"{tmp_path}/train: 3 tars passed over, as folders of images beside them have their names" in caplog.text
    shutil.rmtree(tmp_path / "train" / "n01443537")
    with pytest.raises(UserError, match="8 image files and 4 images in 1 tar shards .n01443537.tar. lie in it"):
        open_source(tmp_path)


def test_a_folder_named_as_a_tar_is_a_class(tmp_path: Path):
    for name in ("a", "z.tar"):
        write_files(tmp_path / name, jpegs(2))
    assert open_source(tmp_path).classes == ("a", "z.tar")
    shutil.rmtree(tmp_path / "a")
    pack_shard(tmp_path / "b.tar", jpegs(20))
    assert len(open_source(f"{tmp_path}/*.tar")) == 20


def test_idx_files_are_no_files_of_other_kinds(tmp_path: Path, caplog):
    write_idx_pairs(tmp_path)
    assert len(open_source(tmp_path)) and not caplog.messages
    (tmp_path / "about.txt").write_text("about")
    assert len(open_source(tmp_path)) and len(caplog.messages) == 1 and "(.txt 1)" in caplog.messages[0]


def test_idx_files_are_known_by_their_whole_names(tmp_path: Path):
    write_idx_pairs(tmp_path)
    assert len(open_source(tmp_path)) == 8
    (tmp_path / "train-images-idx3-ubyte.txt").write_text("about")
    assert len(open_source(tmp_path)) == 8


@pytest.mark.parametrize(
    "name, says",
    [
        ("part-0/0.tar", r"no image files in it, but 2 tar shards further down; give \S+/part-0, or all by \S+/\*/\*\.tar$"),
        ("a/b/0.tar", r"2 tar shards further down; give \S+/a/b, or all by \S+/\*/\*/\*\.tar$"),
        (
            "0.tar.gz",
            r"2 compressed archives in it \(0\.tar\.gz\), and no images; unpack each, .* to a plain \.tar",
        ),
        ("0.zip", r"2 compressed archives in it \(0\.zip\), and no images; unpack each"),
        ("notes.txt", "no image files in it; give a directory that holds image files at any depth, "),
    ],
)
def test_what_lies_elsewhere_is_pointed_at(tmp_path: Path, name: str, says: str):
    for number in range(2):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        file = tmp_path / name.replace("0.", f"{number}.")
        pack_shard(file, jpegs(3)) if file.suffix == ".tar" else file.write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match=f"^{tmp_path}: {says}" if name[0] in "n" else says) as raised:
        open_source(tmp_path)
    if ".tar" in name and "/" in name:
        assert len(open_source(str(raised.value).rpartition(" ")[2])) == 6
