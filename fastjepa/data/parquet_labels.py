"""Labels of the rows of Parquet files: integers, strings, booleans and dictionaries of them as classes, nulls counted."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastjepa.data.tar_shards import labels_and_classes

MOST_NUMBERS = 1_000_000  # integers above are names of their classes, as a barcode is, not numbers from 0


def label_column(schema) -> str | None:
    """Return the name of the column of labels: `label`, else `labels`; one that can be classes goes before one that cannot."""
    present = [name for name in ("label", "labels") if name in schema.names]
    return next((name for name in present if kind_of_label(schema.field(name).type)), present[0] if present else None)


def kind_of_label(kind) -> str | None:
    """Return whether a type of Arrow's is that of "numbers", "names" or "nulls"; None where its values are no classes."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return kind_of_label(kind.value_type)
    # Floating point too: that is what pandas makes of integers beside a null.
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return "numbers"
    if types.is_boolean(kind) or types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "names"
    return "nulls" if types.is_null(kind) else None


def read_labels(columns: Sequence, schema, column: str, where: str | Path) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Return the label of each row, (n,) int64 with -1 for none, and the names of the classes.

    None and () where no row has a label. Columns whose values are no classes are told, as are the rows without a label.

    Args:
        columns: the ChunkedArray of each file; but for those of nulls alone, `kind_of_label` is the same for all.
        schema: that of a file, whose metadata may name the classes of numbers.
        where: the data set, for messages.
    """
    import pyarrow as pa
    from pyarrow import compute

    kinds = {kind_of_label(values.type) for values in columns} - {"nulls"}
    values = _joined(columns, [pa.large_string()]) if kinds == {"names"} else None
    if kinds == {"numbers"}:
        values = _joined(columns, [pa.int64(), pa.uint64()])
    if kinds and values is None:
        held = ", ".join(sorted({str(values.type) for values in columns}))
        logging.getLogger(__name__).warning(
            "%s: its column `%s` holds %s, no classes; its images are taken without labels", where, column, held
        )
    if values is None or values.null_count == len(values):
        return None, ()
    if kinds == {"numbers"} and compute.max(values).as_py() < MOST_NUMBERS:
        labels, names = values.cast(pa.int64()).fill_null(-1).to_numpy(), _hf_names(schema, column, where)
    else:
        labels, names = _numbered(values)
    if values.null_count:
        said = "%s: %d of its %d rows have no label (null, or below 0); the labels of the others are used"
        logging.getLogger(__name__).warning(said, where, values.null_count, len(values))
    return labels, labels_and_classes(labels[labels >= 0], names, where)[1]


def _joined(columns: Sequence, kinds: Sequence):
    """Return columns as one ChunkedArray of the first type that holds them all; None for numbers that are not whole.

    NaN and numbers below 0 become null.
    """
    import pyarrow as pa
    from pyarrow import compute

    for kind in kinds:
        try:
            found = [_without_nan(values).cast(kind) for values in columns]
        except pa.ArrowInvalid:
            continue
        joined = pa.chunked_array([chunk for values in found for chunk in values.chunks], kind)
        return compute.if_else(compute.less(joined, 0), pa.scalar(None, kind), joined) if kind == pa.int64() else joined
    return None


def _without_nan(values):
    """Return a ChunkedArray with the values of a dictionary in place of their numbers, and null in place of NaN."""
    import pyarrow as pa
    from pyarrow import compute, types

    if types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if not types.is_floating(values.type):
        return values
    values = values.cast(pa.float64())
    return compute.if_else(compute.is_nan(values), pa.scalar(None, pa.float64()), values)


def _numbered(values) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the place of each value among all that there are, -1 for null, and these in order, as names.

    ["dog", null, "cat"] gives [1, -1, 0] and ("cat", "dog").
    """
    from pyarrow import compute

    known = compute.unique(values).drop_null()
    known = known.take(compute.sort_indices(known))
    places = compute.index_in(values, value_set=known).fill_null(-1)
    return places.to_numpy().astype(np.int64), tuple(map(str, known.to_pylist()))


def _hf_names(schema, column: str, where: str | Path) -> tuple[str, ...]:
    """Return class names from the JSON that Hugging Face's `datasets` writes into the schema; () where there are none.

    What cannot be read is told: it names classes, and changes no label.
    """
    stored = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(stored)
        for key in ("info", "features", column, "names"):
            names = (names or {}).get(key)
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("the names of classes are no list of strings")
    except (ValueError, AttributeError) as error:
        said = "%s: the metadata `huggingface` of its Parquet files cannot be read (%s); classes have numbers for names"
        logging.getLogger(__name__).warning(said, where, error)
        return ()
    return tuple(names or ())
