"""Images in the rows of Parquet files, such as Hugging Face's data sets."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastjepa.data.tar_shards import labels_and_classes
from fastjepa.errors import UserError


class ParquetImages:
    """Rows of Parquet files that hold encoded images, as Hugging Face writes them.

    The images are the column `image` or `img`, or the only one of bytes or of a struct with the field `bytes`. Labels are
    the integers of a column `label` or `labels`, their names those of the Hugging Face schema. A read unpacks a row group,
    often 100 images, of which each process keeps its last: in random order that is slow, and `fastjepa data shard` helps.
    UserError for files without rows, without such a column, or with other columns than the first.
    """

    def __init__(self, files: Sequence[str | Path], where: str | Path):
        self._files, self._opened, self._last = list(map(str, files)), {}, (-1, None)
        schema = self._file(0).schema_arrow
        self._column, label = _image_column(schema, where), _label_column(schema)
        groups, labels = [], []
        for number, name in enumerate(self._files):
            opened = self._file(number)
            columns = [self._column, *label]
            if any(
                c not in opened.schema_arrow.names or opened.schema_arrow.field(c).type != schema.field(c).type for c in columns
            ):
                raise UserError(
                    f"{name}: other columns than {self._files[0]}; put the files of each data set into a folder of its own"
                )
            groups += [(number, g, opened.metadata.row_group(g).num_rows) for g in range(opened.num_row_groups)]
            labels += [opened.read(label)[c].fill_null(-1).to_numpy() for c in label]
        self._groups = np.array(groups, dtype=np.int64).reshape(-1, 3)  # (groups, 3): file, row group, rows
        self._ends = self._groups[:, 2].cumsum()
        if not len(self):
            raise UserError(f"{where}: no rows in its {len(files)} Parquet files; give files that hold images")
        self._labels, self.classes = None, ()
        if label:
            self._labels, self.classes = labels_and_classes(np.concatenate(labels), _hf_names(schema, *label), where)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": {}, "_last": (-1, None)}  # open files stay in their process

    def _file(self, number: int):
        """Return the opened ParquetFile of that number, once in each process."""
        if number not in self._opened:
            self._opened[number] = _open_table(self._files[number])
        return self._opened[number]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _place(self, i: int) -> tuple[int, int]:
        """Return (row group among all, row in it): with groups of 3 and 2 rows, `_ends` is [3, 5] and row 3 is at (1, 0)."""
        group = int(np.searchsorted(self._ends, i, side="right"))
        return group, i - int(self._ends[group] - self._groups[group, 2])

    def name(self, i: int) -> str:
        """Return the path of image i's file and its row in there."""
        number = self._groups[self._place(i)[0], 0]
        before = self._groups[self._groups[:, 0] < number, 2].sum()
        return f"{self._files[number]}[{i - before}]"

    def read(self, i: int) -> bytes:
        """Return the bytes of image i's encoded file; OSError where there are none, or its row group cannot be read."""
        group, row = self._place(i)
        if self._last[0] != group:
            self._last = group, self._read_group(*self._groups[group, :2].tolist())
        value = self._last[1][row].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if value is None:
            raise OSError(f"{self.name(i)}: a row without bytes")
        return value

    def _read_group(self, number: int, group: int):
        """Return the column of images of one row group; FileNotFoundError or OSError where it cannot be read."""
        from pyarrow import ArrowException

        try:
            return self._file(number).read_row_group(group, columns=[self._column], use_threads=False)[self._column]
        except FileNotFoundError:
            raise
        except (ArrowException, OSError, UserError) as error:
            raise OSError(f"{self._files[number]}: row group {group} cannot be read ({error})") from error

    def label(self, i: int) -> int | None:
        """Return the number of image i's class; None without labels."""
        return None if self._labels is None else int(self._labels[i])


def _open_table(file: str | Path):
    """Return an opened ParquetFile; UserError for one that is not whole, and where pyarrow is not installed."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError("Parquet files need pyarrow; run: pip install 'fastjepa[pyarrow]'") from error
    try:
        return parquet.ParquetFile(file, memory_map=True)
    except ArrowException as error:
        raise UserError(f"{file}: not a whole Parquet file ({error}); get it again") from error


def may_hold_images(file: str | Path) -> bool:
    """Return whether a Parquet file has a column of bytes, as images are kept; UserError as `_open_table`."""
    return bool(_byte_columns(_open_table(file).schema_arrow))


def _byte_columns(schema) -> list[str]:
    """Return the names of the columns of bytes, or of a struct with the field `bytes`."""
    from pyarrow import types

    def holds_bytes(kind) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    return [field.name for field in schema if holds_bytes(field.type)]


def _image_column(schema, where: str | Path) -> str:
    """Return the name of the column that holds encoded images; UserError, which names `where`, for none or several."""
    found = _byte_columns(schema)
    named = [name for name in ("image", "img") if name in found] or found
    if not named or len(named) > 1 and named is found:
        raise UserError(f"{where}: which of the columns {', '.join(schema.names)} holds the images? Name it `image`; "
                          "it must hold bytes, or a struct with the field `bytes`")  # fmt: skip
    return named[0]


def _label_column(schema) -> list[str]:
    """Return the name of the column of labels, or no name."""
    from pyarrow import types

    return [n for n in ("label", "labels") if n in schema.names and types.is_integer(schema.field(n).type)][:1]


def _hf_names(schema, label: str) -> tuple[str, ...]:
    """Return class names from the JSON that Hugging Face's `datasets` writes into the schema; () where there are none."""
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return tuple(stored.get("info", {}).get("features", {}).get(label, {}).get("names") or ())
