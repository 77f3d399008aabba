"""Frozen features on several data sets, side by side, the paper's numbers beside those it has numbers for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from fastjepa.data.prepare.processes import console
from fastjepa.evals.features import Layers
from fastjepa.evals.inputs import Inputs, open_splits, open_subject, provenance
from fastjepa.evals.published import PAPER_COLUMNS, published_for
from fastjepa.evals.table import PROBE_NAMES, in_percent, probe_features, probe_recipe


def evaluate_transfer(
    checkpoint: str | Path,
    data: Sequence[str],
    encoder: Inputs = "target",
    n_train: int | None = None,
    n_test: int | None = None,
    device: str = "auto",
    cache: bool = True,
    seed: int = 0,
    *,
    layers: Layers = "last",
    image_size: int | None = None,
    protocol: str | None = None,
    out: Console | None = None,
) -> dict[str, Any]:
    """k-NN, linear and batch norm + linear on each of `data`: what `fastjepa eval transfer` prints.

    Args, beside those of `table.run`:
        protocol: of the linear probes; None: the published one of data sets with published numbers, else the default.

    Prints the table on `out` (default: standard output), writes it to transfer.json in the run directory and returns it:
    rows, one a data set, each with its provenance, the probes' results and the paper's numbers or None.
    """
    opened = [open_splits(name, n_train, n_test, seed) for name in data]  # a mistake in the last shows before the first is run
    subject = open_subject(checkpoint, device, cache, image_size)
    rows = []
    for splits in opened:
        classes = len(splits[0].source.classes)
        known = published_for(splits[0].data, classes)
        used = protocol or (known.protocol if known else "default")
        console.print(f"{splits[0].data}: {len(splits[0].rows)} training images of {classes} classes")
        pair = subject.features(encoder, splits, layers)
        results = probe_features(*pair, classes, seed, subject.device, probe_recipe(used))
        paper = known and {name: getattr(known, field) for name, field in PAPER_COLUMNS.items()}
        said = {"probe": "transfer", "layers": layers, "protocol": used, **results, "paper": paper}
        rows.append(provenance(subject, encoder, splits, seed) | said)
    found = {"rows": rows}
    subject.write("transfer.json", found)
    show_transfer(rows, out or Console())
    return found


def show_transfer(rows: list[dict[str, Any]], out: Console) -> None:
    """Print the rows that `run` made."""
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
