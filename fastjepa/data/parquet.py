"""Images in the rows of Parquet files, such as Hugging Face's data sets."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastjepa.data.endings import image_endings
from fastjepa.data.parquet_labels import kind_of_label, label_column, read_labels
from fastjepa.data.splits import only_train, split_of_file
from fastjepa.errors import SplitError, UserError


class ParquetImages:
    """Rows of Parquet files that hold encoded images, as Hugging Face writes them.

    The images are the column `image` or `img`, or the only one of bytes or of a struct with the field `bytes`. Labels are
    the column `label` or `labels`: whole numbers, their names those of the Hugging Face schema; or strings or booleans, whose
    classes are in the order of the alphabet. A read unpacks a row group, often 100 images, of which each process keeps its
    last: in random order that is slow, and `fastjepa data shard` helps. UserError for files without rows, without such a
    column, or with other columns than the first.
    """

    def __init__(self, files: Sequence[str | Path], where: str | Path):
        self._files, self._opened, self._last = list(map(str, files)), {}, (-1, None)
        filled = [number for number in range(len(files)) if self._file(number).metadata.num_rows]
        if not filled:
            raise UserError(f"{where}: no rows in its {len(files)} Parquet files; give files that hold images")
        schema = self._file(filled[0]).schema_arrow
        self._column, label = _image_column(schema, where), label_column(schema)
        groups = []
        for number in filled:
            opened = self._file(number)
            if not _same_columns(schema, opened.schema_arrow, self._column, label):
                first = self._files[filled[0]]
                raise UserError(f"{self._files[number]}: other columns than {first}; put the files of each data set into a "
                                "folder of its own")  # fmt: skip
            groups += [(number, g, opened.metadata.row_group(g).num_rows) for g in range(opened.num_row_groups)]
        self._groups = np.array(groups, dtype=np.int64).reshape(-1, 3)  # (groups, 3): file, row group, rows
        self._ends = self._groups[:, 2].cumsum()
        self._labels, self.classes = None, ()
        if label:
            read = [self._read_column(number, label) for number in filled]
            self._labels, self.classes = read_labels(read, schema, label, where)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": {}, "_last": (-1, None)}  # open files stay in their process

    def _file(self, number: int):
        """Return the opened ParquetFile of that number, once in each process."""
        if number not in self._opened:
            self._opened[number] = _open_table(self._files[number])
        return self._opened[number]

    def _read_column(self, number: int, column: str):
        """Return a column of a file, a ChunkedArray; UserError where it cannot be read."""
        from pyarrow import ArrowException

        try:
            return self._file(number).read([column])[column]
        except (ArrowException, OSError) as error:
            reason = _one_line(error)
            raise UserError(f"{self._files[number]}: its column `{column}` cannot be read ({reason}); get it again") from error

    def __len__(self) -> int:
        return int(self._ends[-1])

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
        found = value.get("bytes") if isinstance(value, dict) else value
        if found is None:
            path = value.get("path") if isinstance(value, dict) else None
            raise OSError(f"{self.name(i)}: a row without bytes" + (f", with the path {path!r} alone" if path else ""))
        return found

    def _read_group(self, number: int, group: int):
        """Return the column of images of one row group; FileNotFoundError or OSError where it cannot be read."""
        from pyarrow import ArrowException

        try:
            return self._file(number).read_row_group(group, columns=[self._column], use_threads=False)[self._column]
        except FileNotFoundError:
            raise
        except (ArrowException, OSError, UserError) as error:
            raise OSError(f"{self._files[number]}: row group {group} cannot be read ({_one_line(error)})") from error

    def label(self, i: int) -> int | None:
        """Return the number of image i's class; None without labels, and of a row without one."""
        return None if self._labels is None or self._labels[i] < 0 else int(self._labels[i])


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


def _one_line(error: Exception) -> str:
    """Return what an error says, of which Arrow makes several lines, as one."""
    return " ".join(str(error).split())


def _byte_columns(schema) -> list[str]:
    """Return the names of the columns of bytes, or of a struct with the field `bytes`."""
    from pyarrow import types

    def holds_bytes(kind) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    return [field.name for field in schema if holds_bytes(field.type)]


def _image_column(schema, where: str | Path) -> str:
    """Return the name of the column that holds encoded images; UserError, which names `where`, for none or several."""
    found = _byte_columns(schema)
    named = [name for name in ("image", "img") if name in found] or found
    if not named or len(named) > 1 and named is found:
        raise UserError(f"{where}: which of the columns {', '.join(schema.names)} holds the images? Name it `image`; "
                          "it must hold bytes, or a struct with the field `bytes`")  # fmt: skip
    return named[0]


def _same_columns(schema, other, image: str, label: str | None) -> bool:
    """Return whether a schema holds images and labels as the first one does; widths may differ, and labels be all null."""
    from pyarrow import types

    if image not in other.names or label and label not in other.names:
        return False
    if types.is_struct(schema.field(image).type) != types.is_struct(other.field(image).type):
        return False
    kinds = {kind_of_label(s.field(label).type) for s in (schema, other)} if label else set()
    return image in _byte_columns(other) and len(kinds - {"nulls"}) <= 1


def nested_tables(root: Path, splits: Sequence[str]) -> list[Path]:
    """Return the tables of the first of `splits` there is, below `root`, as in the Hub's default/train/0000.parquet.

    [] where none or an image or a tar lies there. The nearest folder of a split's name says the split, else the file's name.
    UserError where the folders of splits lie in several folders, each a data set; SplitError where there is none of `splits`.
    """
    found = tables_below(root)
    split_of = {path: match for path in found if (match := _nearest_split(path, root))}
    sets = {match.folder for match in split_of.values()}
    if len(sets) > 1:
        names = ", ".join(sorted(folder.name for folder in sets))
        raise UserError(f"{root}: the folders {names} hold a data set each; give one of them")
    if not split_of:
        return only_train(found, root, splits) if found else []
    for name in (name for name in splits if name in {match.split for match in split_of.values()}):
        return [path for path in found if path in split_of and split_of[path].split == name]
    raise SplitError(f"{root}: has no {splits[0]} split; put its Parquet files into {splits[0]}/")


class _NamedSplit(NamedTuple):
    split: str  # train, val or test
    folder: Path  # that of the data set


def _nearest_split(path: Path, root: Path) -> _NamedSplit | None:
    """Return the split that a table's nearest folder below `root` says, else its own name."""
    for named in (*path.relative_to(root).parents[:-1], path):
        if split := split_of_file(named):
            return _NamedSplit(split, root / named.parent)
    return None


def tables_below(root: Path) -> list[Path]:
    """Return all Parquet files below a folder in the order of their names; [] as soon as an image or a tar is met."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (name for name in files if not name.startswith(".")):
            ending = os.path.splitext(name)[1].lower()
            if ending in image_endings() or ending == ".tar":
                return []
            if ending == ".parquet":
                found.append(Path(folder, name))
    return sorted(found)
