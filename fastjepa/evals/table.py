"""The evaluation commands: one probe of one encoder, or the table that shows whether a run has learned."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastjepa.data.prepare.processes import console
from fastjepa.errors import ConfigError
from fastjepa.evals.collapse import effective_rank
from fastjepa.evals.features import Layers
from fastjepa.evals.inputs import Inputs, open_splits, open_subject, provenance
from fastjepa.evals.knn import TEMPERATURE, knn_accuracy
from fastjepa.evals.linear import PROTOCOLS, Recipe, linear_accuracy
from fastjepa.evals.scoring import Features

PROBES = {"knn": knn_accuracy, "linear": linear_accuracy, "linear_bn": functools.partial(linear_accuracy, batch_norm=True)}
PROBE_NAMES = {"knn": "k-NN", "linear": "linear", "linear_bn": "BN + linear"}
TABLE_ROWS = ("raw pixels", "random encoder", "context encoder", "target encoder")


def evaluate_probe(
    kind: str,
    checkpoint: str | Path,
    data: str,
    encoder: Inputs = "target",
    n_train: int | None = None,
    n_test: int | None = None,
    device: str = "auto",
    cache: bool = True,
    seed: int = 0,
    *,
    layers: Layers = "last",
    image_size: int | None = None,
    k: int | None = None,
    temperature: float = TEMPERATURE,
    protocol: str = "default",
    lrs: Sequence[float] | None = None,
    weight_decays: Sequence[float] | None = None,
    n_views: int = 0,
) -> dict[str, Any]:
    """Probe the features of one encoder: what `fastjepa eval knn|linear|linear_bn` prints.

    Args:
        kind: "knn", "linear" or "linear_bn" (batch norm before the linear layer).
        checkpoint: a run directory (its latest checkpoint), a checkpoint, or weights that `load_encoder` reads.
        data: a data set's name or path, with a train split and a val or test split.
        encoder: "target", "context", "random", or "pixels" for none.
        n_train, n_test: use at most this many images, drawn at random by `seed`; default: all.
        cache: keep features below the run directory and reuse them.
        layers: "last", or "concat4": the last four blocks side by side.
        image_size: side of the square images; default: the run's.
        k, temperature: of knn; k None is chosen on training images.
        protocol, lrs, weight_decays, n_views: of the linear probes; a name of PROTOCOLS, a grid in place of the protocol's,
            and how many augmented views of the training images heads are trained on (0: the plain view).

    Returns:
        accuracy, ci95, n_train, n_test, chosen, validation_accuracy, and where it comes from: see `provenance`.
    """
    if kind not in PROBES:
        raise ConfigError(f"evaluation {kind!r} is unknown: choose {' or '.join(PROBES)}")
    splits = open_splits(data, n_train, n_test, seed)
    subject = open_subject(checkpoint, device, cache, image_size)
    train, test = subject.features(encoder, splits, layers, n_views, seed)
    if kind == "knn":
        settings, said = {"k": k, "temperature": temperature}, {"protocol": "default"}
    else:
        settings, said = {"recipe": probe_recipe(protocol, lrs, weight_decays)}, {"protocol": protocol, "views": n_views}
    result = PROBES[kind](train, test, len(splits[0].source.classes), seed=seed, device=subject.device, **settings)
    return provenance(subject, encoder, splits, seed) | {"probe": kind, "layers": layers} | said | result.to_dict()


def probe_recipe(protocol: str, lrs: Sequence[float] | None = None, weight_decays: Sequence[float] | None = None) -> Recipe:
    """A linear probe's protocol by name, with another grid where one is given."""
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol {protocol!r} is unknown: choose {' or '.join(PROTOCOLS)}")
    given = {"lrs": lrs, "weight_decays": weight_decays}
    return dataclasses.replace(PROTOCOLS[protocol], **{name: tuple(grid) for name, grid in given.items() if grid})


def evaluate_table(
    run_dir: str | Path,
    data: str,
    n_train: int | None = 20000,
    n_test: int | None = 10000,
    device: str = "auto",
    cache: bool = True,
    seed: int = 0,
    out: Console | None = None,
) -> dict[str, Any]:
    """Raw pixels, random, context and target encoder under the same two probes and sweeps; arguments as in `run`.

    Prints the table on `out` (default: standard output), writes it to evaluation.json in the run directory and returns it:
    data, n_train, n_test, rows {name: {knn, linear, linear_bn: Result, effective_rank of test features}}, verdict [sentences].
    """
    splits = open_splits(data, n_train, n_test, seed)
    subject = open_subject(run_dir, device, cache)
    rows = {}
    for name in TABLE_ROWS:
        pair = subject.features("pixels" if name == "raw pixels" else name.split()[0], splits)
        console.print(f"probing {name}: {pair[0].x.shape[1]} features")
        rows[name] = probe_features(*pair, len(splits[0].source.classes), seed, subject.device)
    table = {"data": str(data), "n_train": len(splits[0].rows), "n_test": len(splits[1].rows),
             "pixel_size": list(subject.pixel_size), "rows": rows, "verdict": table_verdict(rows)}  # fmt: skip
    subject.write("evaluation.json", table)
    show_table(table, out or Console())
    return table


def probe_features(
    train: Features, test: Features, classes: int, seed: int, device: torch.device, recipe: Recipe = PROTOCOLS["default"]
) -> dict[str, Any]:
    """One row of the table; `recipe` is of the linear probes."""
    asked = {name: {} if name == "knn" else {"recipe": recipe} for name in PROBES}
    results = {name: PROBES[name](train, test, classes, seed=seed, device=device, **asked[name]).to_dict() for name in PROBES}
    return results | {"effective_rank": effective_rank(test.x)}


def table_verdict(rows: dict[str, dict]) -> list[str]:
    """What the table says of the target encoder against an untrained one and against raw pixels, one sentence each."""
    target = rows["target encoder"]

    def gains(other: str) -> dict[str, float]:
        return {PROBE_NAMES[p]: 100 * (target[p]["accuracy"] - rows[other][p]["accuracy"]) for p in PROBES}

    over_random = ", ".join(f"{gain:+.1f} points {name}" for name, gain in gains("random encoder").items())
    lost = [f"{name} by {-gain:.1f} points" for name, gain in gains("raw pixels").items() if gain < 0]
    pixels = f"Raw pixels still win: {', '.join(lost)}." if lost else "Raw pixels win nowhere."
    return [f"Target encoder against the random encoder: {over_random}.", pixels]


def show_table(table: dict[str, Any], out: Console) -> None:
    """Print a table that `demo_table` made."""
    title = f"{table['data']}: accuracy in % ± half the 95 % interval"
    counts = f"{table['n_train']} training and {table['n_test']} test images"
    grid = Table("", *PROBE_NAMES.values(), "effective rank", title=title, caption=counts)
    for name, row in table["rows"].items():
        grid.add_row(name, *(in_percent(row[p]) for p in PROBES), f"{row['effective_rank']:.1f}")
    out.print(grid)
    for sentence in table["verdict"]:
        out.print(sentence, highlight=False)


def in_percent(result: dict[str, Any]) -> str:
    """Accuracy in % and half its interval."""
    low, high = result["ci95"]
    return f"{100 * result['accuracy']:.1f} ± {50 * (high - low):.1f}"
