"""What a run directory holds, as it is read while the run may still be writing, and its readings as curves."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastjepa.checkpoint.directory import latest_checkpoint
from fastjepa.errors import ConfigError
from fastjepa.run.directory import run_directory

CHART_POINTS, TABLE_LINES = 600, 20  # of a curve, and of the table below a chart


class ChartedReading(NamedTuple):
    """How a reading of metrics.jsonl is shown."""

    name: str
    title: str
    group: str
    form: str  # of its values: a format that Python and D3 read alike
    words: str


CHARTED_READINGS = [ChartedReading(*row) for row in (
    ("loss", "Loss", "Learning", ".4f", "Alone it shows nothing: a collapsed network predicts its target perfectly."),
    ("effective_rank", "Effective rank of patch features", "Learning", ".1f", "Under half of its start: collapse."),
    ("feature_std", "Spread of patch features", "Learning", ".3f", "Under a quarter of its start: all patches look alike."),
    ("knn", "Online k-NN accuracy", "Learning", ".1%", "Of some hundred images: a pulse, not a result."),
    ("image_rank", "Effective rank of image features", "Learning", ".1f", "As for patches, over images."),
    ("image_std", "Spread of image features", "Learning", ".3f", "As for patches, over images."),
    ("lidar", "LiDAR", "Learning", ".1f", "Rank of what tells images apart whatever the crop."),
    ("regularizer", "Regularizer", "Learning", ".4f", "The variance-covariance term, its weight applied."),
    ("lr", "Learning rate", "Schedules", ".2e", "A function of the step."),
    ("ema_momentum", "Momentum of the target encoder", "Schedules", ".4f", "How slowly the target encoder follows."),
    ("weight_decay", "Weight decay", "Schedules", ".3f", "A function of the step."),
    ("context_tokens", "Patches a context", "Schedules", ".1f", "Mean over the masks of a micro-batch."),
    ("target_tokens", "Patches a target block", "Schedules", ".1f", "Mean over the blocks of a micro-batch."),
    ("images_per_s", "Images a second", "Speed", ".1f", "All ranks together, without evaluations and checkpoints."),
    ("mfu", "Model FLOP utilisation", "Speed", ".1%", "Of the matrix-product rate that was measured on the same device."),
    ("memory_gib", "Peak memory, GiB", "Speed", ".2f", "Of the first rank: allocated on a GPU, resident on a CPU."),
    ("monitor_share", "Time spent on the monitors", "Speed", ".1%", "Share of the run so far."),
    ("skipped", "Skipped steps", "Trouble", ".0f", "Steps whose gradients were not finite; they changed nothing."),
)]  # fmt: skip


@dataclass(frozen=True)
class RecordedRun:
    """What a run directory holds at one moment."""

    path: Path
    name: str
    entries: list[dict[str, Any]]  # of metrics.jsonl
    torn: int  # lines of it that cannot be read, but for a last one still being written
    record: dict[str, Any]  # config, versions, machine ...; empty where nothing says
    bad_files: list[str]
    results: dict[str, dict[str, Any]]  # {file stem: evaluation}
    checkpoint: Path | None

    def last(self, reading: str) -> float | None:
        return next((value for _, value in reversed(reading_values(self, reading))), None)

    def setting(self, section: str, key: str) -> Any:
        return self.record.get("config", {}).get(section, {}).get(key)

    @property
    def step(self) -> int:
        return self.entries[-1]["step"] if self.entries else 0

    @property
    def total(self) -> int | None:
        """Steps of the whole schedule."""
        epochs, steps = self.setting("optimization", "epochs"), self.record.get("steps_per_epoch")
        return epochs * steps if epochs and steps else None


def read_recorded_run(path: Path, name: str | None = None) -> RecordedRun:
    """A run directory, or that of a checkpoint, whatever is there of it; ConfigError when it is none."""
    home = run_directory(path)
    if not home.is_dir() or not any((home / file).exists() for file in ("metrics.jsonl", "run.json", "checkpoints")):
        raise ConfigError(f"{path}: no run directory (no metrics.jsonl, run.json or checkpoints); name what --output named")
    entries, torn = read_lines(home / "metrics.jsonl")
    found = latest_checkpoint(home / "checkpoints", tag=None)
    state = load_json(found / "state.json") if found else {}
    record = (load_json(home / "run.json") if (home / "run.json").exists() else {}) or state.get("record", {})
    others = {file.stem: load_json(file) for file in sorted(home.glob("*.json")) if file.name != "run.json"}
    results = {stem: found for stem, found in others.items() if isinstance(found, dict)}
    return RecordedRun(home, name or home.name, entries, torn, record, state.get("bad_files", []), results, found)


def load_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error}); write it anew or move it away") from error


def read_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """(entries, how many lines are none); a last line without its end is being written and counts as neither."""
    text = file.read_text(errors="replace") if file.exists() else ""
    *whole, _ = text.split("\n")
    entries, torn = [], 0
    for line in whole:
        try:
            entry = json.loads(line)
            entry["step"] + 0
            entries.append(entry)
        except (ValueError, KeyError, TypeError):
            torn += 1
    return entries, torn


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def reading_values(run: RecordedRun, reading: str) -> list[tuple[int, float]]:
    """(step, value) of every entry that has the reading as a finite number."""
    return [(entry["step"], entry[reading]) for entry in run.entries if is_number(entry.get(reading))]


def thinned_points(points: Sequence[tuple[float, float]], limit: int = CHART_POINTS) -> list[tuple[float, float]]:
    """At most `limit` (even, at least 4) points: the ends, and the lowest and highest of equal stretches between them."""
    if len(points) <= limit:
        return list(points)
    inner, stretches = points[1:-1], limit // 2 - 1
    kept = {0, len(points) - 1}
    for i in range(stretches):
        stretch = range(i * len(inner) // stretches, (i + 1) * len(inner) // stretches)
        kept |= {1 + pick(stretch, key=lambda j: inner[j][1]) for pick in (min, max)}
    return [points[i] for i in sorted(kept)]


def reading_charts(runs: Sequence[RecordedRun]) -> list[dict[str, Any]]:
    """A chart for each reading that a run has, those that READINGS does not know last; none of skips that never were."""
    known = {reading.name for reading in CHARTED_READINGS} | {"step", "epoch"}
    names = dict.fromkeys(name for run in runs for entry in run.entries for name in entry)
    others = [ChartedReading(name, name, "Other readings", ".4~g", "") for name in names if name not in known]
    made = (
        reading_chart(reading, [reading_values(run, reading.name) for run in runs], runs)
        for reading in [*CHARTED_READINGS, *others]
    )
    return [one for one in made if one["curves"] and (one["name"] != "skipped" or any(run.last("skipped") for run in runs))]


def reading_chart(
    reading: ChartedReading, curves: list[list[tuple[int, float]]], runs: Sequence[RecordedRun]
) -> dict[str, Any]:
    """What the page draws and says of one reading."""
    shown = [(number, points) for number, points in enumerate(curves) if points]
    said = (f"{runs[number].name} from {shown_number(points[0][1], reading.form)} at step {points[0][0]} to "
            f"{shown_number(points[-1][1], reading.form)} at step {points[-1][0]}" for number, points in shown)  # fmt: skip
    return reading._asdict() | {
        "id": f"chart-{reading.name}",
        "summary": f"{reading.title}: {'; '.join(said)}",
        "curves": [{"run": number, "points": thinned_points(points)} for number, points in shown],
        "lost": sum(
            reading.name in e and e[reading.name] is None for run in runs for e in run.entries if reading.name != "mfu"
        ),
        "table": readings_table([points for _, points in shown], reading.form),
        "columns": [runs[number].name for number, _ in shown],
    }


def shown_number(value: float, form: str) -> str:
    return format(value, form.replace("~", ""))


def readings_table(curves: list[list[tuple[int, float]]], form: str) -> list[list[str]]:
    """At most ROWS evenly chosen steps, each with every curve's latest value up to it; a dash before and after a curve."""
    steps = sorted({step for curve in curves for step, _ in curve})
    count = min(TABLE_LINES, len(steps))
    chosen = [steps[i * (len(steps) - 1) // max(1, count - 1)] for i in range(count)]
    return [[str(step), *(value_at(curve, step, form) for curve in curves)] for step in chosen]


def value_at(curve: list[tuple[int, float]], step: int, form: str) -> str:
    past = [value for x, value in curve if x <= step]
    return shown_number(past[-1], form) if past and step <= curve[-1][0] else "–"
