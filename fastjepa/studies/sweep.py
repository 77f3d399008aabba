"""Studies: which arms there are, and running them side by side, each a process that goes on where it was stopped."""

import concurrent.futures
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastjepa.config.load import load_config
from fastjepa.config.schema import Config
from fastjepa.errors import ConfigError
from fastjepa.files import write_atomic
from fastjepa.plan.flops import flops_per_image
from fastjepa.studies.arm import JOB_FILE, PROBED_INPUT, ROW_FILE, Arm, departures_from_default
from fastjepa.studies.masking import MASKING_ARMS, MASKING_PAPER
from fastjepa.studies.scaling import SCALING_ARMS, SCALING_PAPER
from fastjepa.studies.small import SMALL_ARMS, SMALL_PAPER
from fastjepa.studies.truncation import TRUNCATION_ARMS, TRUNCATION_PAPER

BASE_CONFIG = "study"  # the config that every arm starts from


class Study(NamedTuple):
    title: str
    arms: tuple[Arm, ...]
    paper: str  # what its column is
    budget: int = 100_000  # images an arm sees
    equal: Literal["images", "flops"] = "images"  # flops: as many images as cost what the budget costs the base

    def named(self, names: Iterable[str] | None) -> tuple[Arm, ...]:
        """The arms of these names, in the study's order; all when None."""
        wanted = None if names is None else list(names)
        unknown = set(wanted or ()) - {arm.name for arm in self.arms}
        if unknown:
            raise ConfigError(
                f"--arms {sorted(unknown)[0]!r}: no arm of this study; choose of: {', '.join(a.name for a in self.arms)}"
            )
        return tuple(arm for arm in self.arms if wanted is None or arm.name in wanted)


STUDIES = {
    "masking": Study("Masking strategies and the paper's other knobs", MASKING_ARMS, MASKING_PAPER),
    "small": Study("I-JEPA on small data", SMALL_ARMS, SMALL_PAPER),
    "scaling": Study("Model size, data and epochs", SCALING_ARMS, SCALING_PAPER),
    "truncation": Study("What the cut of contexts costs", TRUNCATION_ARMS, TRUNCATION_PAPER, equal="flops"),
}


class ArmJob(NamedTuple):
    """An arm with a seed: all that its row depends on, and where it runs."""

    folder: Path
    asked: dict[str, Any]

    @property
    def row(self) -> Path:
        return self.folder / ROW_FILE

    @property
    def label(self) -> str:
        return f"{self.asked['arm']}, seed {self.asked['seed']}"


def plan_jobs(name: str, output: Path, data: str, seeds: int, budget: int | None = None, arms: Iterable[str] | None = None,
         overrides: Iterable[str] = ()) -> list[ArmJob]:  # fmt: skip
    """Every arm with every seed, all arms with one seed before the next, so that a sweep that is stopped early says something.

    The name of a job's folder holds a hash of what is trained: with another override or budget it is another folder, and
    the same run in two studies is one.
    """
    study = STUDIES[name]
    budget = budget or study.budget
    jobs = []
    for seed in range(seeds):
        asked = (f"data.source={data}", *overrides, f"runtime.seed={seed}")  # a seed's masks have FLOPs of their own
        base = flops_per_image(load_config(BASE_CONFIG, asked)) if study.equal == "flops" else 0.0
        for arm in study.named(arms):
            config = load_config(BASE_CONFIG, (*asked, *arm.overrides))
            share = base / flops_per_image(config) if base else 1.0
            images = round(budget * arm.length * share) if PROBED_INPUT[arm.method] == "target" else 0
            jobs.append(arm_job(name, arm, seed, config, data, images, output))
    return jobs


def arm_job(study: str, arm: Arm, seed: int, config: Config, data: str, images: int, output: Path) -> ArmJob:
    asked = {"study": study, "arm": arm.name, "group": arm.group, "seed": seed, "method": arm.method, "paper": arm.paper,
             "data": data, "fraction": arm.fraction, "images": images, "overrides": list(arm.overrides)}  # fmt: skip
    told = {key: asked[key] for key in ("seed", "method", "data", "fraction", "images")} | {
        "config": departures_from_default(config)
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
    folder = output / "runs" / f"{digest}-seed{seed}"
    return ArmJob(folder, asked | {"hash": digest, "config": config.to_dict()})


def job_rows(jobs: Iterable[ArmJob], kept: Path | None = None) -> list[dict[str, Any]]:
    """The rows of these jobs that exist, in their folders or in the folder `kept` of reports, under these arms' names."""
    found, stored = [], stored_rows(kept)
    for job in jobs:
        row = json.loads(job.row.read_text()) if job.row.is_file() else stored.get(job.asked["hash"])
        found += [row | {name: job.asked[name] for name in ("study", "arm", "group", "paper", "overrides")}] if row else []
    return found


def stored_rows(kept: Path | None) -> dict[str, dict[str, Any]]:
    """The rows that reports have written to a folder, by the hash of what was trained: studies share arms."""
    files = [kept / f"{name}.json" for name in STUDIES] if kept else []
    return {row["hash"]: row for file in files if file.is_file() for row in json.loads(file.read_text())}


def sweep_jobs(jobs: list[ArmJob], side_by_side: int, console: Console, kept: Path | None = None) -> list[str]:
    """Run the jobs that have no row yet, in their folders or in `kept`; returns the labels of those that failed."""
    stored, failed = stored_rows(kept), []
    waiting = [job for job in jobs if not (job.row.is_file() or job.asked["hash"] in stored)]
    with jobs_progress(console) as bar, RunningJobs() as children:
        task = bar.add_task("arms", total=len(jobs), completed=len(jobs) - len(waiting))
        with concurrent.futures.ThreadPoolExecutor(side_by_side) as pool:
            running = {pool.submit(children.run, job): job for job in waiting}
            try:
                for future in concurrent.futures.as_completed(running):
                    job = running[future]
                    bar.console.print(row_in_words(job, future.result()), highlight=False, soft_wrap=True, markup=False)
                    failed += [] if job.row.is_file() else [job.label]
                    bar.advance(task)
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                children.stop()
                raise
    return failed


def jobs_progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal)


class RunningJobs:
    """The processes of the arms. SIGTERM to this one is passed on as Ctrl-C is: they save a checkpoint and end."""

    def __enter__(self) -> "RunningJobs":
        self.running: set[subprocess.Popen] = set()
        self._before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def run(self, job: ArmJob) -> int:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(job.folder / JOB_FILE, (json.dumps(job.asked, indent=1) + "\n").encode())
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        command = [sys.executable, "-m", "fastjepa.studies.worker", str(job.folder)]
        with open(job.folder / "log.txt", "a") as log:
            child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            self.running.add(child)
            code = child.wait()
        self.running.discard(child)
        return code

    def stop(self) -> None:
        for child in list(self.running):
            child.terminate()


def row_in_words(job: ArmJob, code: int) -> str:
    """A line about a job that has ended."""
    if not job.row.is_file():
        lines = (job.folder / "log.txt").read_text().splitlines() or ["it wrote nothing"]
        return f"{job.label}: failed with exit code {code}: {lines[-1]} ({job.folder / 'log.txt'})"
    row = json.loads(job.row.read_text())
    found = ", ".join(f"{name} {100 * row['probe'][name]['accuracy']:.1f}" for name in ("knn", "linear", "linear_bn"))
    return f"{job.label}: {found}, effective rank {row['probe']['effective_rank']:.1f}, {row['seconds'] / 60:.1f} min of steps"
