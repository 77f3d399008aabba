"""Run directories for reports."""

import json
from pathlib import Path

from fastjepa.config.schema import Config


def write_run(folder: Path, entries: list[dict], changed: dict[str, dict] | None = None, **record) -> Path:
    """A run directory without checkpoints; `changed`: settings beside the defaults."""
    config = Config().to_dict()
    for section, keys in (changed or {}).items():
        config[section] |= keys
    about = {"config": config, "versions": {"torch": "2"}, "machine": "m", "world": 1, "steps_per_epoch": 10, **record}
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder
