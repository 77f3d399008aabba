"""One arm of a study with one seed, in a process of its own: train, probe, write the row.

`python -m fastjepa.studies.arm FOLDER` works in the folder, which is the run's directory too. Stopped at any moment, it goes
on from its checkpoint when it is run again; two processes never work at one arm. The row is there whole or not at all.
"""

import dataclasses
import fcntl
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from fastjepa import checkpoint, cli, flops
from fastjepa.config import Config, from_dict
from fastjepa.evals import features, table
from fastjepa.evals.subject import open_splits, open_subject
from fastjepa.manifest import step_of
from fastjepa.sources import open_source
from fastjepa.studies import mae, shares, subset

JOB, ROW, CONFIG = "job.json", "row.json", "arm.yaml"
WARMUP = 0.1  # share of the steps
N_TRAIN = 20000  # images a probe learns from, as in `fastjepa eval table`
MEANING = ("data", "mask", "meta", "optimization", "loss")  # sections of a config that say what is trained
PROBED = {"ijepa": "target", "mae": "target", "random": "random", "pixels": "pixels"}  # by method: what is evaluated

Method = Literal["ijepa", "mae", "random", "pixels"]


class Arm(NamedTuple):
    """What is compared. Arms of a group differ from the base in one thing, which the group is named after (but `together`)."""

    name: str
    group: str
    overrides: tuple[str, ...] = ()  # section.key=value
    paper: float | None = None  # what the paper has in this place
    method: Method = "ijepa"  # random and pixels train nothing
    length: float = 1.0  # images seen, as a multiple of the study's budget
    fraction: float = 1.0  # of the training images


def main(folder: Path) -> int:
    """Exit code 0 when the row is there, 130 when a signal has stopped the arm, 2 for an error, its message printed."""
    try:
        with alone(folder):
            if not (folder / ROW).is_file():
                row = run(json.loads((folder / JOB).read_text()), folder)
                features.write_atomic(folder / ROW, (json.dumps(row, indent=1) + "\n").encode())
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not cli.expected(error):
            raise
        print(error)
        return 2
    return 0


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait for another process that works in `folder`; its end, even by SIGKILL, lets go."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The row of a job; KeyboardInterrupt where a signal has stopped its training."""
    data = subset.of(job["data"], job["fraction"], folder)
    config, steps = scheduled(from_dict(job["config"]), data, job["images"])
    (folder / CONFIG).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    trained = {"images": 0, "seconds": 0.0, "flops": 0.0}
    if PROBED[job["method"]] == "target":
        (mae.train if job["method"] == "mae" else ijepa)(folder / CONFIG, folder, steps)
        if step_of(checkpoint.find(folder)) < steps:
            raise KeyboardInterrupt
        images = steps * config.data.batch_size
        trained = {"images": images, "seconds": images / rate(folder), "flops": images * cost(config, job["method"])}
    else:
        (folder / "config.yaml").write_text((folder / CONFIG).read_text())
    kept = {name: value for name, value in job.items() if name != "config"}
    return kept | trained | {"changed": departures(config)} | evaluated(job, folder) | {"made_by": made_by()}


def departures(config: Config) -> dict[str, dict[str, Any]]:
    """What is trained, as far as it differs from the defaults: keys that are added later change nothing."""
    default, given = Config().to_dict(), config.to_dict()
    return {name: {k: v for k, v in given[name].items() if v != default[name][k]} for name in MEANING}


def scheduled(config: Config, data: str, images: int) -> tuple[Config, int]:
    """The config whose schedules end after `images` images of `data`, and its steps."""
    batch = config.data.batch_size
    an_epoch, steps = len(open_source(data)) // batch, max(1, images // batch)
    epochs = math.ceil(steps / an_epoch)
    scale = steps / (epochs * an_epoch)  # the last epoch may end beyond the last step: schedules are compressed
    changed = {
        "data": {"source": data},
        "optimization": {"epochs": epochs, "warmup": WARMUP * steps / an_epoch, "ipe_scale": scale},
        "logging": {"every": min(config.logging.every, steps)},
    }
    replaced = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changed.items()}
    return dataclasses.replace(config, **replaced), steps


def ijepa(config: Path, folder: Path, steps: int) -> None:
    """By the trainer's own command, which resumes."""
    if code := cli.main(["train", "--config", str(config), "--output", str(folder), "--max-steps", str(steps)]):
        raise SystemExit(code)


def cost(config: Config, method: str) -> float:
    """FLOPs of training on an image."""
    return mae.flops_per_image(config) if method == "mae" else flops.of_config(config)


def rate(folder: Path) -> float:
    """Images per second of a run's steps, by its log, however often it was stopped."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] - before for before, line in zip([0, *(line["step"] for line in lines)], lines, strict=False)]
    return sum(steps) / sum(count / line["images_per_s"] for count, line in zip(steps, lines, strict=True))


def evaluated(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Of the encoder that the method evaluates: k-NN, linear and BN + linear with their defaults, and the effective rank of
    its pooled features (`probe`); what its tokens are made of (`shares`), None of pixels."""
    splits, which = open_splits(job["data"], N_TRAIN, None, job["seed"]), PROBED[job["method"]]
    subject = open_subject(folder, cache=False)
    pair = subject.features(which, splits, seed=job["seed"])
    probe = table.probe(*pair, len(splits[0].source.classes), job["seed"], subject.device)
    return {"probe": probe, "shares": None if which == "pixels" else shares.of(subject, which, splits[1])}


def made_by() -> dict[str, Any]:
    """Versions, and the commit where fastjepa lies in its repository."""
    import platform

    import torch

    import fastjepa

    root = Path(fastjepa.__file__).resolve().parent.parent
    described = ["git", "-c", "safe.directory=*", "-C", str(root), "describe", "--always", "--dirty"]
    commit = subprocess.run(described, capture_output=True, text=True).stdout.strip() if (root / ".git").exists() else None
    return {"fastjepa": fastjepa.__version__, "commit": commit, "torch": torch.__version__,
            "machine": platform.machine(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
