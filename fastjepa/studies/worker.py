"""Worker of a sweep: one arm with one seed, in a process of its own, trained and probed, and its row written.

`python -m fastjepa.studies.worker FOLDER` works in the folder, which is the run's directory too. Stopped at any moment, it goes
on from its checkpoint when it is run again. Two processes never work at one arm. The row is there whole or not at all.
"""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import yaml

from fastjepa.checkpoint.directory import find_checkpoint, step_of
from fastjepa.config.load import config_from_dict, load_config
from fastjepa.config.schema import Config
from fastjepa.data.sources import open_source
from fastjepa.errors import is_users_to_mend
from fastjepa.evals.dense.heads import DenseRecipe, PatchNeighbours
from fastjepa.evals.dense.table import DenseOptions, evaluate_dense
from fastjepa.evals.inputs import Which, open_splits, open_subject
from fastjepa.evals.lowlevel import evaluate_lowlevel
from fastjepa.evals.request import EvalRequest
from fastjepa.evals.table import probe_features
from fastjepa.files import locked, write_atomic
from fastjepa.loader.loader import check_loader
from fastjepa.plan.flops import flops_per_image
from fastjepa.plan.plan import workload_of
from fastjepa.studies.arm import ARM_CONFIG, JOB_FILE, PROBED_INPUT, ROW_FILE
from fastjepa.studies.mae import mae_flops_per_image, train_mae
from fastjepa.studies.subset import subset_of
from fastjepa.studies.sweep import departures_from_default
from fastjepa.studies.token_variance import token_variance
from fastjepa.train import train

PACE_ROUNDS, PACE_STEPS = 5, 60  # trials that tell an arm's pace, and steps of one
WARMUP_SHARE = 0.1  # of the steps
DENSE_IMAGES, DENSE_BANK, DENSE_STEPS = (2000, 1000), 5000, 500  # to train and test on; patches of k-NN; steps of the head
PROBE_TRAIN_IMAGES = 20000  # images a probe learns from, as in `fastjepa eval table`


def main(folder: Path) -> int:
    """Return 0 when the row is there, 130 when a signal has stopped the arm, 2 after printing the message of an error."""
    try:
        with locked(folder / ".lock"):
            if not (folder / ROW_FILE).is_file():
                row = run_arm(json.loads((folder / JOB_FILE).read_text()), folder)
                write_atomic(folder / ROW_FILE, json.dumps(row, indent=1) + "\n")
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not is_users_to_mend(error):
            raise
        print(error)
        return 2
    return 0


def run_arm(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train and probe, and return the row of a job; KeyboardInterrupt where a signal has stopped the training."""
    data = subset_of(job["data"], job["fraction"], folder)
    asked = config_from_dict(job["config"])
    within = "minutes" in job
    images = images_within(job, asked, data, folder) if within else job["images"]
    config, steps = scheduled_config(asked, data, images)
    trained = {"images": 0, "seconds": 0.0, "cpu_seconds": 0.0, "flops": 0.0}
    if PROBED_INPUT[job["method"]] == "target":
        train_arm(job["method"], config, folder, steps)
        images, lines = steps * config.data.batch_size, logged_lines(folder)
        trained = {
            "images": images,
            "seconds": images / logged_rate(lines),
            "cpu_seconds": sum(line["cpu_s"] for line in lines),
            "flops": images * training_flops(config, job["method"]),
        }
    else:
        write_atomic(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
    if within:
        trained["pace"] = job["base_pace"] * pace_over_base(job, asked, data, folder)  # images a second of the counted minutes
    kept = {name: value for name, value in job.items() if name not in ("config", "base", "pace_file")}
    evaluate = evaluate_pixels if job.get("measured") == "pixels" else evaluate_images
    return kept | trained | {"changed": departures_from_default(config)} | evaluate(job, folder) | {"made_by": made_by()}


def train_arm(method: str, config: Config, folder: Path, steps: int) -> None:
    """Train by a method for so many steps in all; KeyboardInterrupt where a signal has stopped it before."""
    folder.mkdir(exist_ok=True)
    write_atomic(folder / ARM_CONFIG, yaml.safe_dump(config.to_dict(), sort_keys=False))
    (train_mae if method == "mae" else train_ijepa)(folder / ARM_CONFIG, folder, steps)
    if step_of(find_checkpoint(folder)) < steps:
        raise KeyboardInterrupt


def images_within(job: dict[str, Any], config: Config, data: str, folder: Path) -> int:
    """Return how many images the arm trains on in `minutes` of a core on which the base trains on `base_pace` images/s."""
    return round(60 * job["minutes"] * job["base_pace"] * pace_over_base(job, config, data, folder))


def pace_over_base(job: dict[str, Any], config: Config, data: str, folder: Path) -> float:
    """Return the arm's images a second of CPU time over the base's: 0.5 for an arm whose images cost twice as much.

    Trials of PACE_STEPS steps alternate between the two, and the shortest of each counts, as other work on the machine only
    ever lengthens one. The pace is kept beside the folder, for all seeds and lengths of the arm: they differ by chance and not
    by budget, and an arm that goes on has the schedule that it began with.
    """
    if job["method"] == "ijepa" and job["config"] == job["base"]:
        return 1.0
    file, base = folder.parent / job["pace_file"], config_from_dict(job["base"])
    with locked(file.with_suffix(".lock")):
        if not file.is_file():
            rounds = [(trial_seconds("ijepa", base, data, folder), trial_seconds(job["method"], config, data, folder))
                      for _ in range(PACE_ROUNDS)]  # fmt: skip
            of_base, of_arm = map(min, zip(*rounds, strict=True))
            write_atomic(file, json.dumps({"over_base": of_base / of_arm, "cpu_s_of_base_and_arm": rounds}) + "\n")
    return json.loads(file.read_text())["over_base"]


def trial_seconds(method: str, config: Config, data: str, folder: Path) -> float:
    """Return the CPU time in seconds of an image's share of a step, by a trial that leaves nothing behind."""
    trial = folder / "pace"
    shutil.rmtree(trial, ignore_errors=True)
    paced, steps = scheduled_config(config, data, PACE_STEPS * config.data.batch_size)
    logging = dataclasses.replace(paced.logging, every=PACE_STEPS // 6, monitor_every=0)
    train_arm(method, dataclasses.replace(paced, logging=logging), trial, steps)
    seconds = min(line["cpu_s"] for line in logged_lines(trial)[1:])  # the first line warms up
    shutil.rmtree(trial)
    return seconds / (logging.every * config.data.batch_size)


def scheduled_config(config: Config, data: str, images: int) -> tuple[Config, int]:
    """Return the config whose schedules end after `images` images of `data`, and its steps; ConfigError where data are few."""
    source, batch = open_source(data), config.data.batch_size
    check_loader(config, source, 1)
    an_epoch, steps = len(source) // batch, max(1, images // batch)
    epochs = math.ceil(steps / an_epoch)
    # The last epoch may end beyond the last step, so schedules are compressed: 25 steps of 10 an epoch are 3 epochs at 25 / 30.
    scale = steps / (epochs * an_epoch)
    changed = {
        "data": {"source": data},
        "optimization": {"epochs": epochs, "warmup": WARMUP_SHARE * steps / an_epoch, "ipe_scale": scale},
        "logging": {"every": min(config.logging.every, steps)},
    }
    replaced = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changed.items()}
    return dataclasses.replace(config, **replaced), steps


def train_ijepa(config: Path, folder: Path, steps: int) -> None:
    """Train with the trainer itself, which resumes where it was stopped."""
    train(load_config(config), folder, steps)


def training_flops(config: Config, method: str) -> float:
    """Return the FLOPs of training on one image."""
    return mae_flops_per_image(config) if method == "mae" else flops_per_image(workload_of(config))


def logged_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, one set of lines however often it was stopped."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged_rate(lines: list[dict[str, Any]]) -> float:
    """Return the images per second of a run's steps, by the lines of its log."""
    steps = [line["step"] - before for before, line in zip([0, *(line["step"] for line in lines)], lines, strict=False)]
    return sum(steps) / sum(count / line["images_per_s"] for count, line in zip(steps, lines, strict=True))


def evaluate_images(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Evaluate by images the encoder that the method trained, or its stand-in.

    Returns:
        `probe`: k-NN, linear and BN + linear with their defaults, and the effective rank of the pooled features;
        `shares`: the parts of the tokens' energy, None where there is no network.
    """
    splits, which = open_splits(job["data"], PROBE_TRAIN_IMAGES, None, job["seed"]), PROBED_INPUT[job["method"]]
    subject = open_subject(folder, cache=False)
    pair = subject.features(which, splits, seed=job["seed"])
    probe = probe_features(*pair, len(splits[0].source.classes), job["seed"], subject.device)
    shares = token_variance(subject, which, splits[1]) if which in get_args(Which) else None
    return {"probe": probe, "shares": shares}


def evaluate_pixels(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Evaluate by pixels, on rendered scenes, the encoder that the method trained, or its stand-in.

    Returns:
        `dense`: n_test, and the scores of k-NN and a linear layer, for shapes and for depth;
        `counting`: the linear probe of how many objects there are.
    """
    which, seed = PROBED_INPUT[job["method"]], job["seed"]
    request = EvalRequest(folder, job["data"], which, seed=seed, cache=False)
    fewer, dense = dataclasses.replace(request, n_train=DENSE_IMAGES[0], n_test=DENSE_IMAGES[1]), {}
    heads = {"neighbours": PatchNeighbours(bank=DENSE_BANK), "recipe": DenseRecipe(steps=DENSE_STEPS)}
    for task in ("segmentation", "depth"):
        table, _ = evaluate_dense(fewer, DenseOptions(task, encoders=(which,), **heads))
        (row,) = table["rows"].values()
        dense[task] = row | {"n_test": table["n_test"]}
    counting = evaluate_lowlevel(request, "count")
    del counting["checkpoint"]  # a path, which means nothing where the row is read
    return {"dense": dense, "counting": counting}


def made_by() -> dict[str, Any]:
    """Return versions and the machine, with the commit where fastjepa lies in its repository."""
    import platform

    import torch

    from fastjepa import __version__

    root = Path(__file__).resolve().parent.parent.parent
    described = ["git", "-c", "safe.directory=*", "-C", str(root), "describe", "--always", "--dirty"]
    commit = subprocess.run(described, capture_output=True, text=True).stdout.strip() if (root / ".git").exists() else None
    return {"fastjepa": __version__, "commit": commit, "torch": torch.__version__,
            "machine": platform.machine(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
