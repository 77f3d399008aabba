"""Frozen features on several data sets, side by side, the paper's numbers beside those it has numbers for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from fastjepa.evals import features, table
from fastjepa.evals.features import Layers
from fastjepa.evals.subject import Inputs, open_splits, open_subject, provenance


@dataclass(frozen=True)
class Published:
    """Linear accuracy in % of frozen features on a data set, and the protocol it was reached with (paper, tables 3 and 4)."""

    classes: int
    protocol: str
    ijepa_h14: float
    mae_h14: float
    ibot_l16: float


PUBLISHED = {
    "cifar100": Published(100, "cifar100", 87.5, 77.3, 88.3),
    "places205": Published(205, "places205", 58.4, 55.0, 60.4),
    "inat18": Published(8142, "inat18", 47.6, 32.9, 57.3),
    "clevrcount": Published(8, "default", 86.7, 90.5, 85.7),
    "clevrdist": Published(6, "default", 72.4, 72.4, 62.8),
}
PAPER = {"I-JEPA H/14": "ijepa_h14", "MAE H/14": "mae_h14", "iBOT L/16": "ibot_l16"}


def published(data: str, classes: int) -> Published | None:
    """The paper's numbers for a data set of this name (case, - and _ aside) and this many classes."""
    entry = PUBLISHED.get(re.sub(r"[^a-z0-9]", "", Path(data).name.lower()))
    return entry if entry and entry.classes == classes else None


def run(
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
        known = published(splits[0].data, classes)
        used = protocol or (known.protocol if known else "default")
        features.console.print(f"{splits[0].data}: {len(splits[0].rows)} training images of {classes} classes")
        pair = subject.features(encoder, splits, layers)
        results = table.probe(*pair, classes, seed, subject.device, table.recipe(used))
        paper = known and {name: getattr(known, field) for name, field in PAPER.items()}
        said = {"probe": "transfer", "layers": layers, "protocol": used, **results, "paper": paper}
        rows.append(provenance(subject, encoder, splits, seed) | said)
    found = {"rows": rows}
    subject.write("transfer.json", found)
    show(rows, out or Console())
    return found


def show(rows: list[dict[str, Any]], out: Console) -> None:
    """Print the rows that `run` made."""
    title = f"{rows[0]['encoder']} encoder, frozen: accuracy in % ± half the 95 % interval"
    caption = "right of the probes: published, the best linear head on the test images"
    grid = Table(Column("", overflow="fold"), title=title, caption=caption)
    for name in (*table.NAMES.values(), *PAPER):
        grid.add_column(name.replace(" H", "\nH").replace(" L", "\nL"), no_wrap=True)
    for row in rows:
        probes = (table.percent(row[probe]) for probe in table.NAMES)
        paper = (f"{row['paper'][name]:.1f}" if row["paper"] else "" for name in PAPER)
        grid.add_row(Path(row["data"]).name, *probes, *paper)
    out.print(grid)
