"""Contents of a run directory, read while the run may still be writing."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastjepa.checkpoint.directory import latest_checkpoint
from fastjepa.errors import UserError
from fastjepa.run.directory import run_directory


@dataclass(frozen=True)
class RecordedRun:
    """Contents of a run directory at one moment."""

    path: Path
    name: str
    entries: list[dict[str, Any]]  # lines of metrics.jsonl
    torn: int  # lines of it that cannot be read, but for a last one still being written
    record: dict[str, Any]  # config, versions, machine ...; empty where no file says
    bad_files: list[str]
    results: dict[str, dict[str, Any]]  # {file stem: evaluation}
    checkpoint: Path | None  # the latest one

    def values(self, reading: str) -> list[tuple[int, float]]:
        """Return (step, value) of every entry that has the reading as a finite number."""
        return [(entry["step"], entry[reading]) for entry in self.entries if is_number(entry.get(reading))]

    def last(self, reading: str) -> float | None:
        """Return the last value of a reading; None where there is none."""
        return next((value for _, value in reversed(self.values(reading))), None)

    def setting(self, section: str, key: str) -> Any:
        """Return a setting of the run's config; None where no file says."""
        return self.record.get("config", {}).get(section, {}).get(key)

    @property
    def step(self) -> int:
        """The last step that was logged; 0 before the first."""
        return self.entries[-1]["step"] if self.entries else 0

    @property
    def total(self) -> int | None:
        """Steps of the whole schedule; None where no file says."""
        epochs, steps = self.setting("optimization", "epochs"), self.record.get("steps_per_epoch")
        return epochs * steps if epochs and steps else None


def read_recorded_run(path: Path, name: str | None = None) -> RecordedRun:
    """Read what there is of a run directory, or of a checkpoint's; UserError where `path` is neither."""
    home = run_directory(path)
    if not home.is_dir() or not any((home / file).exists() for file in ("metrics.jsonl", "run.json", "checkpoints")):
        raise UserError(f"{path}: no run directory (no metrics.jsonl, run.json or checkpoints); name what --output named")
    entries, torn = read_metrics(home / "metrics.jsonl")
    checkpoint = latest_checkpoint(home / "checkpoints", tag=None)
    state = load_json(checkpoint / "state.json") if checkpoint else {}
    record = (load_json(home / "run.json") if (home / "run.json").exists() else {}) or state.get("record", {})
    others = {file.stem: load_json(file) for file in sorted(home.glob("*.json")) if file.name != "run.json"}
    results = {stem: found for stem, found in others.items() if isinstance(found, dict)}
    return RecordedRun(home, name or home.name, entries, torn, record, state.get("bad_files", []), results, checkpoint)


def load_json(file: Path) -> Any:
    """Return what a JSON file holds; UserError where it is none."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); write it anew or move it away") from error


def read_metrics(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the entries of metrics.jsonl and how many lines are none.

    A last line without its newline is being written: it counts as neither.
    """
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
    """Return whether a value of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
