"""Frozen features on several data sets, side by side, the paper's numbers beside those it has numbers for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from fastjepa.data.prepare.processes import console
from fastjepa.evals.inputs import provenance
from fastjepa.evals.published import PAPER_COLUMNS, published_for
from fastjepa.evals.request import EvalRequest
from fastjepa.evals.table import PROBE_NAMES, in_percent, probe_features, probe_recipe


def evaluate_transfer(
    requests: Sequence[EvalRequest], protocol: str | None = None, out: Console | None = None
) -> dict[str, Any]:
    """Measure k-NN, linear and batch norm + linear on several data sets, as `fastjepa eval transfer` does.

    The table is printed on `out` (default: standard output) and written to transfer.json in the run directory.

    Args:
        requests: one a data set, of the same checkpoint.
        protocol: of the linear probes; None: the published one of data sets with published numbers, else the default.

    Returns:
        {"rows": one a data set, with its provenance, the probes' results and the paper's numbers or None}.
    """
    opened = [request.splits() for request in requests]  # a mistake in the last shows before the first is run
    subject = requests[0].subject()
    rows = []
    for request, splits in zip(requests, opened, strict=True):
        classes = len(splits[0].source.classes)
        known = published_for(splits[0].data, classes)
        used = protocol or (known.protocol if known else "default")
        console.print(f"{splits[0].data}: {len(splits[0].rows)} training images of {classes} classes")
        pair = subject.features(request.encoder, splits, request.layers)
        results = probe_features(*pair, classes, request.seed, subject.device, probe_recipe(used))
        paper = known and {name: getattr(known, field) for name, field in PAPER_COLUMNS.items()}
        said = {"probe": "transfer", "layers": request.layers, "protocol": used, **results, "paper": paper}
        rows.append(provenance(subject, request.encoder, splits, request.seed) | said)
    found = {"rows": rows}
    subject.write("transfer.json", found)
    show_transfer(rows, out or Console())
    return found


def show_transfer(rows: list[dict[str, Any]], out: Console) -> None:
    """Print the rows that `evaluate_transfer` made."""
    title = f"{rows[0]['encoder']} encoder, frozen: accuracy in % ± half the 95 % interval"
    caption = "right of the probes: published, the best linear head on the test images"
    grid = Table(Column("", overflow="fold"), title=title, caption=caption)
    for name in (*PROBE_NAMES.values(), *PAPER_COLUMNS):
        grid.add_column(name.replace(" H", "\nH").replace(" L", "\nL"), no_wrap=True)
    for row in rows:
        probes = (in_percent(row[probe]) for probe in PROBE_NAMES)
        paper = (f"{row['paper'][name]:.1f}" if row["paper"] else "" for name in PAPER_COLUMNS)
        grid.add_row(Path(row["data"]).name, *probes, *paper)
    out.print(grid)
