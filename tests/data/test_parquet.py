"""Parquet files as people have them: in folders of splits or deeper, in row groups, empty, with bytes of any type."""

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from fastjepa.cli.main import main
from fastjepa.data.sources import open_source
from fastjepa.errors import UserError
from tests.support.images import save_image

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_table(file: Path, images: pa.Array, group: int = 2, **columns: pa.Array) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({"image": images} | columns), file, row_group_size=group)


def write_rows(root: Path, files: dict[str, list[bytes]]) -> Path:
    for name, rows in files.items():
        write_table(root / name, pa.array(rows, pa.binary()))
    return root


def rows_of(root: Path, split: str = "train") -> list[bytes]:
    source = open_source(root, split)
    return [source.read(i) for i in range(len(source))]


LAYOUTS = {  # files, and the rows of each split
    "the Hub's": (
        {"default/train/0000.parquet": [b"a", b"b"], "default/train/0001.parquet": [b"d"], "default/test/0000.parquet": [b"e"]},
        {"train": [b"a", b"b", b"d"], "test": [b"e"], "val": [b"e"]},
    ),
    "the Hub's, large": (
        {"plain_text/partial-train/0.parquet": [b"a"], "plain_text/partial-validation/0.parquet": [b"b"], "README.md": []},
        {"train": [b"a"], "val": [b"b"], "test": [b"b"]},
    ),
    "splits of parts": (
        {"train/part=1/0.parquet": [b"b"], "train/part=0/0.parquet": [b"a"], "val/part=0/x.parquet": [b"c"]},
        {"train": [b"a", b"b"], "val": [b"c"]},
    ),
    "splits in data/": ({"data/train/0.parquet": [b"a"], "data/val/0.parquet": [b"b"]}, {"train": [b"a"], "val": [b"b"]}),
    "files of splits, deeper": (
        {"en/train-0.parquet": [b"a"], "en/validation-0.parquet": [b"b"]},
        {"train": [b"a"], "val": [b"b"]},
    ),
    "no split": ({"a/1/0.parquet": [b"a"], "b/0.parquet": [b"b"], ".cache/0.parquet": [b"x"]}, {"train": [b"a", b"b"]}),
    "as Spark writes": ({"set.parquet/part-0.parquet": [b"a"], "set.parquet/part-1.parquet": [b"b"]}, {"train": [b"a", b"b"]}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_in_folders(tmp_path: Path, layout: str):
    files, splits = LAYOUTS[layout]
    write_rows(tmp_path, {name: rows for name, rows in files.items() if rows})
    (tmp_path / "README.md").write_text("a data set")
    assert {split: rows_of(tmp_path, split) for split in splits} == splits


def test_a_split_that_is_not_there_is_refused(tmp_path: Path):
    write_rows(tmp_path, {"default/train/0.parquet": [b"a"]})
    with pytest.raises(UserError, match=r"has no val split; put its Parquet files into val/"):
        open_source(tmp_path, "val")
    (tmp_path / "default" / "train").rename(tmp_path / "default" / "other")
    with pytest.raises(UserError, match="has no test split"):
        open_source(tmp_path, "test")


def test_several_data_sets_are_no_data_set(tmp_path: Path):
    write_rows(tmp_path, {f"{name}/train/0.parquet": [b"a"] for name in ("en", "fr")})
    with pytest.raises(UserError, match="the folders en, fr hold a data set each; give one of them"):
        open_source(tmp_path)
    assert rows_of(tmp_path / "fr") == [b"a"]


def test_tables_beside_images_are_no_data_set(tmp_path: Path):
    save_image(tmp_path / "images" / "0.png", seed=0)
    write_rows(tmp_path, {"meta/train/0.parquet": [b"a"]})
    assert open_source(tmp_path).name(0).endswith("images/0.png")


BYTES = {
    "binary": pa.array([b"a", b"b", b"c"], pa.binary()),
    "large_binary": pa.array([b"a", b"b", b"c"], pa.large_binary()),
    "binary_view": pa.array([b"a", b"b", b"c"], pa.binary_view()),
    "struct": pa.array([{"bytes": raw, "path": "x"} for raw in (b"a", b"b", b"c")], STRUCT),
    "large struct": pa.array([{"path": None, "bytes": raw} for raw in (b"a", b"b", b"c")],
                             pa.struct([("path", pa.large_string()), ("bytes", pa.large_binary())])),
}  # fmt: skip


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("group", [1, 2, 10])
def test_bytes_of_any_type_in_any_row_groups(tmp_path: Path, kind: str, group: int):
    write_table(tmp_path / "0.parquet", BYTES[kind], group, about=pa.array(["x", None, "y"]))
    assert rows_of(tmp_path) == [b"a", b"b", b"c"]


def test_widths_of_bytes_may_differ_and_empty_files_count_nothing(tmp_path: Path):
    write_table(tmp_path / "0.parquet", pa.nulls(0), label=pa.nulls(0))  # as pandas writes an empty one
    write_table(tmp_path / "1.parquet", BYTES["binary"], label=pa.array([0, 1, 0]))
    write_table(tmp_path / "2.parquet", pa.array([], pa.binary()), label=pa.array([], pa.int64()))
    write_table(tmp_path / "3.parquet", BYTES["large_binary"], label=pa.array([0, 1, 0], pa.uint8()))
    source = open_source(tmp_path)
    assert [source.read(i) for i in (0, 5)] == [b"a", b"c"] and source.name(5) == f"{tmp_path}/3.parquet[2]"
    for number in (1, 3):
        (tmp_path / f"{number}.parquet").unlink()
    with pytest.raises(UserError, match="no rows in its [12] Parquet files"):
        open_source(tmp_path)


def test_rows_without_bytes_are_bad_and_say_why(tmp_path: Path, capsys):
    png = save_image(tmp_path / "in" / "0.png", seed=0).read_bytes()
    rows = [{"bytes": png, "path": None}, {"bytes": None, "path": "a/1.png"}, None, {"bytes": b"", "path": None}]
    write_table(tmp_path / "x.parquet", pa.array(rows, STRUCT))
    assert main(["data", "check", f"{tmp_path}/x.parquet", "--workers", "1", "--output", str(tmp_path / "bad")]) == 1
    out = capsys.readouterr().out
    assert "x.parquet[1]: unreadable (" in out and "a row without bytes, with the path 'a/1.png' alone" in out
    assert "x.parquet[2]: unreadable (" in out and "x.parquet[3]: zero bytes" in out and "bad: 3, " in out
