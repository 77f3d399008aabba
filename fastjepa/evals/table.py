"""The evaluation commands: one probe of one encoder, or the table that shows whether a run has learned."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fastjepa import catalog, distributed
from fastjepa.config import Config, ConfigError
from fastjepa.evals import features
from fastjepa.evals.features import Which
from fastjepa.evals.knn import knn
from fastjepa.evals.linear import linear
from fastjepa.evals.result import TEST_IMAGES, TRAIN_IMAGES, Features, subset
from fastjepa.metrics import effective_rank
from fastjepa.sources import Source, open_source

PROBES = {"knn": knn, "linear": linear, "linear_bn": functools.partial(linear, batch_norm=True)}
NAMES = {"knn": "k-NN", "linear": "linear", "linear_bn": "BN + linear"}
ROWS = ("raw pixels", "random encoder", "context encoder", "target encoder")
SMALL, TINY = 64, (32, 32)  # raw pixels of images above SMALL a side are taken at TINY: a probe cannot hold 150,000 of them


@dataclass(frozen=True)
class Split:
    """The images of one split that an evaluation uses."""

    data: str
    name: str
    source: Source
    rows: np.ndarray  # rising indices into source


@dataclass(frozen=True)
class Subject:
    """A run to evaluate: its config, where it lies, how and where its encoders run, where features are kept."""

    path: Path
    config: Config
    device: torch.device
    cache: Path | None

    def features(self, which: Which, splits: tuple[Split, Split]) -> tuple[Features, Features]:
        """(train, test) features of one encoder."""
        encoder = features.load_encoder(self.path, which, self.config)
        weights, config = features.fingerprint(encoder), self.config
        low = self.device.type == "cuda" and config.runtime.dtype == "bf16"
        dtype = torch.bfloat16 if low else torch.float32

        def of(split: Split) -> Features:
            key = {"weights": weights, "data": split.data, "split": split.name, "count": len(split.rows),
                   "images": features.describe(split.source, split.rows), "size": config.image_size,
                   "mean_std": config.mean_std, "patch_size": config.mask.patch_size, "heads": config.encoder_shape[2],
                   "dtype": str(dtype)}  # fmt: skip
            return features.cached(
                lambda: features.extract(encoder, split.source, config.image_size, config.data.channels, config.mean_std,
                                         self.device, rows=split.rows, dtype=dtype),
                self.cache, key)  # fmt: skip

        return of(splits[0]), of(splits[1])

    def pixels(self, splits: tuple[Split, Split]) -> tuple[Features, Features]:
        """(train, test) raw pixels, at the run's image size unless that is large."""
        size, data = self.pixel_size, self.config.data
        train, test = (features.raw_pixels(s.source, size, data.channels, self.config.mean_std, rows=s.rows) for s in splits)
        return train, test

    @property
    def pixel_size(self) -> tuple[int, int]:
        size = self.config.image_size
        return size if max(size) <= SMALL else TINY


def run(
    kind: str,
    checkpoint: str | Path,
    data: str,
    encoder: Which = "target",
    n_train: int | None = None,
    n_test: int | None = None,
    device: str = "auto",
    cache: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Probe the features of one encoder: what `fastjepa eval knn|linear|linear_bn` prints.

    Args:
        kind: "knn", "linear" or "linear_bn" (batch norm before the linear layer).
        checkpoint: a run directory (its latest checkpoint) or a checkpoint.
        data: a data set's name or path, with a train split and a val or test split.
        n_train, n_test: use at most this many images, drawn at random by `seed`; default: all.
        cache: keep features below the run directory and reuse them.

    Returns:
        accuracy, ci95, encoder, data, n_train, n_test, probe, chosen, validation_accuracy.
    """
    if kind not in PROBES:
        raise ConfigError(f"evaluation {kind!r} is unknown: choose {' or '.join(PROBES)}")
    splits = open_splits(data, n_train, n_test, seed)
    subject = open_subject(checkpoint, device, cache)
    train, test = subject.features(encoder, splits)
    result = PROBES[kind](train, test, classes=len(splits[0].source.classes), seed=seed, device=subject.device)
    return {"encoder": encoder, "data": str(data), "probe": kind} | result.to_dict()


def demo_table(
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
    for name in ROWS:
        pair = subject.pixels(splits) if name == "raw pixels" else subject.features(name.split()[0], splits)
        features.console.print(f"probing {name}: {pair[0].x.shape[1]} features")
        rows[name] = probe(*pair, len(splits[0].source.classes), seed, subject.device)
    table = {"data": str(data), "n_train": len(splits[0].rows), "n_test": len(splits[1].rows),
             "pixel_size": list(subject.pixel_size), "rows": rows, "verdict": verdict(rows)}  # fmt: skip
    features.write_atomic(run_directory(Path(run_dir)) / "evaluation.json", (json.dumps(table, indent=1) + "\n").encode())
    show(table, out or Console())
    return table


def probe(train: Features, test: Features, classes: int, seed: int, device: torch.device) -> dict[str, Any]:
    """One row of the table."""
    results = {name: ask(train, test, classes, seed=seed, device=device).to_dict() for name, ask in PROBES.items()}
    return results | {"effective_rank": effective_rank(test.x)}


def verdict(rows: dict[str, dict]) -> list[str]:
    """What the table says of the target encoder against an untrained one and against raw pixels, one sentence each."""
    target = rows["target encoder"]

    def gains(other: str) -> dict[str, float]:
        return {NAMES[p]: 100 * (target[p]["accuracy"] - rows[other][p]["accuracy"]) for p in PROBES}

    over_random = ", ".join(f"{gain:+.1f} points {name}" for name, gain in gains("random encoder").items())
    lost = [f"{name} by {-gain:.1f} points" for name, gain in gains("raw pixels").items() if gain < 0]
    pixels = f"Raw pixels still win: {', '.join(lost)}." if lost else "Raw pixels win nowhere."
    return [f"Target encoder against the random encoder: {over_random}.", pixels]


def show(table: dict[str, Any], out: Console) -> None:
    """Print a table that `demo_table` made."""
    title = f"{table['data']}: accuracy in % ± half the 95 % interval"
    counts = f"{table['n_train']} training and {table['n_test']} test images"
    grid = Table("", *NAMES.values(), "effective rank", title=title, caption=counts)
    for name, row in table["rows"].items():
        grid.add_row(name, *(_percent(row[p]) for p in PROBES), f"{row['effective_rank']:.1f}")
    out.print(grid)
    for sentence in table["verdict"]:
        out.print(sentence, highlight=False)


def _percent(result: dict[str, Any]) -> str:
    low, high = result["ci95"]
    return f"{100 * result['accuracy']:.1f} ± {50 * (high - low):.1f}"


def open_splits(data: str, n_train: int | None, n_test: int | None, seed: int) -> tuple[Split, Split]:
    """The training and test images of `data`; ConfigError when they have no labels or not the same classes."""
    train, test = open_source(data, "train"), open_source(data, "test")
    if len(train.classes) < 2:
        raise ConfigError(
            f"{data}: labels of {len(train.classes)} classes, and a probe needs two; put images into class folders"
        )
    if test.classes != train.classes[: len(test.classes)]:
        odd = sorted(set(test.classes) ^ set(train.classes))
        raise ConfigError(f"{data}: its train and test splits have different classes ({odd[0]!r} is in one only)")
    return (Split(str(data), "train", train, subset(n_train, len(train), seed, TRAIN_IMAGES)),
            Split(str(data), "test", test, subset(n_test, len(test), seed, TEST_IMAGES)))  # fmt: skip


def open_subject(path: str | Path, device: str = "auto", cache: bool = True) -> Subject:
    """The run or checkpoint at `path`; features are kept below the run directory, or with the data for a lone checkpoint."""
    path = Path(path)
    home = run_directory(path)
    folder = (home if (home / "config.yaml").is_file() else catalog.data_dir()) / "features"
    return Subject(path, features.read_config(path), distributed.init(device).device, folder if cache else None)


def run_directory(path: Path) -> Path:
    """The run directory of a checkpoint, or `path` itself."""
    path = path.resolve()
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent if path.name == "checkpoints" else path
