"""Labels of Parquet rows: whole numbers of any width, strings, booleans and dictionaries are classes; nulls are counted."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from fastjepa.cli.main import main
from fastjepa.data.sources import open_source
from fastjepa.errors import UserError
from fastjepa.monitoring.monitor import gather_probe
from tests.support.batches import settings
from tests.support.images import save_image

NAMED = json.dumps({"info": {"features": {"label": {"names": ["cat", "dog", "emu"], "_type": "ClassLabel"}}}})


def write_tables(folder: Path, *columns: pa.Array, metadata: str | bytes = "{}", name: str = "label", group: int = 2) -> Path:
    """One file for each column of labels, in row groups of `group`, beside images that are never read."""
    for number, labels in enumerate(columns):
        table = pa.table({"image": pa.array([b"x"] * len(labels), pa.binary()), name: labels})
        file = folder / f"{number}.parquet"
        parquet.write_table(table.replace_schema_metadata({"huggingface": metadata}), file, row_group_size=group)
    return folder


def read(folder: Path) -> tuple[list[int | None], tuple[str, ...]]:
    source = open_source(folder)
    return [source.label(i) for i in range(len(source))], source.classes


@pytest.mark.parametrize(
    "kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "double"]
)
@pytest.mark.parametrize("metadata", ["{}", NAMED])
def test_numbers_of_any_width_are_classes(tmp_path: Path, kind: str, metadata: str, caplog):
    labels = pa.array(np.array([2, 0, 1, 2, 0]).astype(getattr(np, "float64" if kind == "double" else kind)), kind)
    names = ("cat", "dog", "emu") if metadata == NAMED else ("0", "1", "2")
    assert read(write_tables(tmp_path, labels, metadata=metadata)) == ([2, 0, 1, 2, 0], names)
    assert not caplog.records


DICTIONARY = pa.array(["dog", None, "cat", "dog"], pa.string()).dictionary_encode()
OTHER_KINDS = {
    "string": ([pa.array(["dog", "cat", "dog", "é"])], [1, 0, 1, 2], ("cat", "dog", "é")),
    "large_string": ([pa.array(["dog", "cat", "dog"], pa.large_string())], [1, 0, 1], ("cat", "dog")),
    "string_view": ([pa.array(["dog", "cat"], pa.string_view())], [1, 0], ("cat", "dog")),
    "strings that are numbers": ([pa.array(["10", "9"])], [0, 1], ("10", "9")),
    "dictionary": ([DICTIONARY], [1, None, 0, 1], ("cat", "dog")),
    "dictionary of numbers": ([pa.array([7, 0, 7], pa.uint16()).dictionary_encode()], [7, 0, 7], tuple("01234567")),
    "boolean": ([pa.array([True, False, True])], [1, 0, 1], ("false", "true")),
    "one null": ([pa.array([0, None, 1])], [0, None, 1], ("0", "1")),
    "null among floats, as of pandas": ([pa.array([0.0, float("nan"), 1.0, None])], [0, None, 1, None], ("0", "1")),
    "-1, which is none": ([pa.array([0, -1, 1], pa.int8())], [0, None, 1], ("0", "1")),
    "decimal": ([pa.array([2, 0], pa.decimal128(5, 0))], [2, 0], ("0", "1", "2")),
    "ids": ([pa.array([4_000_000_000, 7, None, 7], pa.uint32())], [1, 0, None, 0], ("7", "4000000000")),
    "ids above 2^63": ([pa.array([2**64 - 1, 5], pa.uint64())], [1, 0], ("5", str(2**64 - 1))),
    "widths that differ": ([pa.array([1, 0], pa.uint8()), pa.array([2], pa.int64())], [1, 0, 2], ("0", "1", "2")),
    "a file of nulls alone": ([pa.nulls(2), pa.array(["b", "a"])], [None, None, 1, 0], ("a", "b")),
    "strings beside a dictionary": ([pa.array(["emu"]), DICTIONARY], [2, 1, None, 0, 1], ("cat", "dog", "emu")),
    "an empty file": ([pa.array([], pa.string()), pa.array([1, 0])], [1, 0], ("0", "1")),
}


@pytest.mark.parametrize("case", OTHER_KINDS)
def test_strings_booleans_dictionaries_and_nulls(tmp_path: Path, case: str, caplog):
    columns, labels, classes = OTHER_KINDS[case]
    assert read(write_tables(tmp_path, *columns)) == (labels, classes)
    none = labels.count(None)
    said = f"{tmp_path}: {none} of its {len(labels)} rows have no label (null, or below 0); the labels of the others are used"
    assert [record.getMessage() for record in caplog.records] == [said] * (none > 0)


@pytest.mark.parametrize("labels", [pa.nulls(3), pa.array([None] * 3, pa.string()), pa.array([-1] * 3, pa.int8())])
def test_without_any_label_there_are_no_classes(tmp_path: Path, labels: pa.Array, caplog):
    assert read(write_tables(tmp_path, labels, metadata=NAMED)) == ([None] * 3, ())
    assert not caplog.records


NO_CLASSES = {
    "list<": pa.array([[0], [1, 2], []]),
    "double": pa.array([0.25, 1, 2]),
    "float": pa.array([0, 1, np.inf], pa.float32()),
    "struct<a: int64>": pa.array([{"a": 1}] * 3),
    "timestamp[": pa.array([1, 2, 3], pa.timestamp("ms")),
}


@pytest.mark.parametrize("held", NO_CLASSES)
@pytest.mark.parametrize("name", ["label", "labels"])
def test_what_is_no_class_is_told(tmp_path: Path, held: str, name: str, caplog):
    assert read(write_tables(tmp_path, NO_CLASSES[held], name=name)) == ([None] * 3, ())
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{tmp_path}: its column `{name}` holds {held}")
    assert said.endswith(", no classes; its images are taken without labels")


@pytest.mark.parametrize(
    "metadata",
    [b"not json", b"\xff\xfe", b"[1]", b"7", b'{"info": [1]}', b'{"info": {"features": {"label": {"names": [1, 2, 3]}}}}',
     b'{"info": {"features": {"label": {"names": {"0": "cat"}}}}}', b'{"info": {"features": {"label": "ClassLabel"}}}'],
)  # fmt: skip
def test_metadata_that_cannot_be_read_are_told(tmp_path: Path, metadata: bytes, caplog):
    assert read(write_tables(tmp_path, pa.array([2, 0, 1]), metadata=metadata)) == ([2, 0, 1], ("0", "1", "2"))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{tmp_path}: the metadata `huggingface` of its Parquet files cannot be read (")


@pytest.mark.parametrize("metadata", [b"{}", b"null", b'{"info": null}', b'{"info": {"features": {"image": {}}}}'])
def test_metadata_need_not_name_classes(tmp_path: Path, metadata: bytes, caplog):
    assert read(write_tables(tmp_path, pa.array([1, 0]), metadata=metadata)) == ([1, 0], ("0", "1"))
    assert not caplog.records


@pytest.mark.parametrize("second", [pa.array(["a"]), pa.array([[0]]), pa.array([True])])
def test_files_with_other_labels_are_named(tmp_path: Path, second: pa.Array):
    with pytest.raises(UserError, match=r"1.parquet: other columns than .*0.parquet"):
        read(write_tables(tmp_path, pa.array([0]), second))


def test_labels_that_are_damaged_are_named(tmp_path: Path):
    file = write_tables(tmp_path, pa.array([0, 1] * 500), group=1000) / "0.parquet"
    raw, start = bytearray(file.read_bytes()), parquet.ParquetFile(file).metadata.row_group(0).column(1).dictionary_page_offset
    raw[start : start + 12] = b"\xff" * 12
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"0.parquet: its column `label` cannot be read \(.*\); get it again"):
        open_source(tmp_path)


def test_data_check_and_a_probe_take_rows_without_a_label(tmp_path: Path, capsys):
    """Two rows in three have a label, of 8 bits without a sign."""
    images = [save_image(tmp_path / "in" / f"{i}.png", seed=i).read_bytes() for i in range(24)]
    labels = pa.array([i % 2 if i % 3 else None for i in range(24)], pa.uint8())
    parquet.write_table(pa.table({"image": images, "label": labels}), tmp_path / "a.parquet")
    assert main(["data", "check", str(tmp_path / "a.parquet"), "--workers", "1"]) == 0
    assert "24 images read" in capsys.readouterr().out
    probe = gather_probe(settings(tmp_path / "a.parquet"), open_source(tmp_path / "a.parquet"))
    assert len(probe.bank) == len(probe.bank_labels) and len(probe.queries) == len(probe.query_labels)
    known = [label for label in probe.bank_labels.tolist() if label >= 0]  # the rest of the bank has no vote
    assert {*known, *probe.query_labels.tolist()} == {0, 1} and len(known) + len(probe.queries) == 16
