"""Probes of pooled features: one of one encoder, or the table that shows whether a run has learned."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastjepa.data.prepare.processes import console
from fastjepa.errors import UserError
from fastjepa.evals.collapse import effective_rank
from fastjepa.evals.inputs import provenance
from fastjepa.evals.knn import TEMPERATURE, Neighbours, knn_accuracy
from fastjepa.evals.linear import PROTOCOLS, Recipe, linear_accuracy
from fastjepa.evals.request import EvalRequest
from fastjepa.evals.scoring import Features, Result

PROBE_NAMES = {"knn": "k-NN", "linear": "linear", "linear_bn": "BN + linear"}
TABLE_ROWS = ("raw pixels", "random encoder", "context encoder", "target encoder")


@dataclass(frozen=True)
class ProbeOptions:
    """Settings of the three probes; each takes its own."""

    k: int | None = None  # of knn; None: chosen on training images
    temperature: float = TEMPERATURE
    protocol: str = "default"  # of the linear probes, a name of PROTOCOLS
    lrs: Sequence[float] | None = None  # a grid in place of the protocol's
    weight_decays: Sequence[float] | None = None
    n_views: int = 0  # augmented views of the training images that heads are trained on; 0: the plain view


def evaluate_probe(kind: str, request: EvalRequest, options: ProbeOptions = ProbeOptions()) -> dict[str, Any]:
    """Probe the features of one encoder and return the row that `fastjepa eval knn|linear|linear_bn` prints.

    Args:
        kind: "knn", "linear" or "linear_bn" (batch norm before the linear layer).

    Returns:
        accuracy, ci95, n_train, n_test, chosen, validation_accuracy, and where it comes from: see `provenance`.
    """
    if kind not in PROBE_NAMES:
        raise UserError(f"evaluation {kind!r} is unknown: choose {' or '.join(PROBE_NAMES)}")
    recipe = probe_recipe(options.protocol, options.lrs, options.weight_decays)
    setting = Neighbours(options.k, options.temperature) if kind == "knn" else recipe
    splits, subject = request.splits(), request.subject()
    pair = subject.features(request.encoder, splits, request.layers, options.n_views, request.seed)
    result = measure_probe(kind, pair, len(splits[0].source.classes), request.seed, subject.device, setting)
    said = {"protocol": "default"} if kind == "knn" else {"protocol": options.protocol, "views": options.n_views}
    about = {"probe": kind, "layers": request.layers} | said
    return provenance(subject, request.encoder, splits, request.seed) | about | result.to_dict()


def measure_probe(
    kind: str,
    pair: tuple[Features, Features],
    classes: int,
    seed: int,
    device: torch.device,
    setting: Neighbours | Recipe,
) -> Result:
    """Measure one probe of PROBE_NAMES on (train, test) features."""
    if kind == "knn":
        return knn_accuracy(*pair, classes, seed, device, setting)
    return linear_accuracy(*pair, classes, seed, device, dataclasses.replace(setting, batch_norm=kind == "linear_bn"))


def probe_recipe(protocol: str, lrs: Sequence[float] | None = None, weight_decays: Sequence[float] | None = None) -> Recipe:
    """Return a linear probe's protocol by name, with another grid where one is given."""
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol {protocol!r} is unknown: choose {' or '.join(PROTOCOLS)}")
    given = {"lrs": lrs, "weight_decays": weight_decays}
    return dataclasses.replace(PROTOCOLS[protocol], **{name: tuple(grid) for name, grid in given.items() if grid})


def evaluate_table(request: EvalRequest, out: Console | None = None) -> dict[str, Any]:
    """Probe raw pixels, random, context and target encoder alike; `encoder` and `layers` of the request play no part.

    The table is printed on `out` (default: standard output) and written to evaluation.json in the run directory.

    Returns:
        data, n_train, n_test, rows {name: {knn, linear, linear_bn: Result, effective_rank of test features}}, verdict
        [sentences].
    """
    splits, subject, rows = request.splits(), request.subject(), {}
    for name in TABLE_ROWS:
        pair = subject.features("pixels" if name == "raw pixels" else name.split()[0], splits)
        console.print(f"probing {name}: {pair[0].x.shape[1]} features")
        rows[name] = probe_features(*pair, len(splits[0].source.classes), request.seed, subject.device)
    table = {"data": str(request.data), "n_train": len(splits[0].rows), "n_test": len(splits[1].rows),
             "pixel_size": list(subject.pixel_size), "rows": rows, "verdict": table_verdict(rows)}  # fmt: skip
    subject.write("evaluation.json", table)
    show_table(table, out or Console())
    return table


def probe_features(
    train: Features, test: Features, classes: int, seed: int, device: torch.device, recipe: Recipe = PROTOCOLS["default"]
) -> dict[str, Any]:
    """Measure all probes of one pair of features: a row of the table. `recipe` is of the linear probes."""
    settings = {"knn": Neighbours(), "linear": recipe, "linear_bn": recipe}
    results = {kind: measure_probe(kind, (train, test), classes, seed, device, settings[kind]) for kind in PROBE_NAMES}
    return {kind: result.to_dict() for kind, result in results.items()} | {"effective_rank": effective_rank(test.x)}


def table_verdict(rows: dict[str, dict]) -> list[str]:
    """Compare the target encoder with an untrained one and with raw pixels, one sentence each."""
    target = rows["target encoder"]

    def gains(other: str) -> dict[str, float]:
        return {PROBE_NAMES[p]: 100 * (target[p]["accuracy"] - rows[other][p]["accuracy"]) for p in PROBE_NAMES}

    over_random = ", ".join(f"{gain:+.1f} points {name}" for name, gain in gains("random encoder").items())
    lost = [f"{name} by {-gain:.1f} points" for name, gain in gains("raw pixels").items() if gain < 0]
    pixels = f"Raw pixels still win: {', '.join(lost)}." if lost else "Raw pixels win nowhere."
    return [f"Target encoder against the random encoder: {over_random}.", pixels]


def show_table(table: dict[str, Any], out: Console) -> None:
    """Print a table that `evaluate_table` made."""
    title = f"{table['data']}: accuracy in % ± half the 95 % interval"
    counts = f"{table['n_train']} training and {table['n_test']} test images"
    grid = Table("", *PROBE_NAMES.values(), "effective rank", title=title, caption=counts)
    for name, row in table["rows"].items():
        grid.add_row(name, *(in_percent(row[p]) for p in PROBE_NAMES), f"{row['effective_rank']:.1f}")
    out.print(grid)
    for sentence in table["verdict"]:
        out.print(sentence, highlight=False)


def in_percent(result: dict[str, Any]) -> str:
    """Write a result as its accuracy in % and half its interval."""
    low, high = result["ci95"]
    return f"{100 * result['accuracy']:.1f} ± {50 * (high - low):.1f}"
