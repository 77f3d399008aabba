"""Sweeps: the studies with their arms, and running the arms side by side, each a process that goes on where it was stopped."""

import concurrent.futures
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastjepa.config.load import config_from_dict, load_config
from fastjepa.config.schema import Config
from fastjepa.errors import UserError
from fastjepa.evals.dense.labels import SCENE_KINDS, rendered_pictures
from fastjepa.evals.inputs import open_splits
from fastjepa.files import write_atomic
from fastjepa.plan.flops import flops_per_image
from fastjepa.plan.plan import with_teacher_shape, workload_of
from fastjepa.studies.arm import JOB_FILE, PROBED_INPUT, ROW_FILE, Arm
from fastjepa.studies.dense import DENSE_ARMS, DENSE_PAPER, DENSE_SETTINGS
from fastjepa.studies.equal_minutes import MINUTES_ARMS, MINUTES_PAPER
from fastjepa.studies.masking import MASKING_ARMS, MASKING_PAPER
from fastjepa.studies.measures import OF_IMAGES, OF_PIXELS, Measures
from fastjepa.studies.scaling import SCALING_ARMS, SCALING_PAPER
from fastjepa.studies.small_data import SMALL_ARMS, SMALL_PAPER
from fastjepa.studies.truncation import TRUNCATION_ARMS, TRUNCATION_PAPER

BASE_CONFIG = "study"  # the config that every arm starts from
MEANINGFUL_SECTIONS = ("data", "mask", "meta", "optimization", "loss")  # sections of a config that say what is trained
MEANINGFUL_RUNTIME = ("dtype", "micro_batch", "target_fp8")  # keys of its runtime that change numbers by more than rounding
SET_BY_SWEEP = ("data.source", "optimization.epochs", "optimization.warmup", "optimization.ipe_scale", "runtime.seed")


class Study(NamedTuple):
    """Arms to compare, and how much each may train."""

    title: str
    arms: tuple[Arm, ...]
    paper: str  # what the paper's column holds
    budget: int = 100_000  # images an arm sees
    equal: Literal["images", "flops"] = "images"  # flops: as many images as cost what the budget costs the base
    minutes: float | None = None  # that an arm trains for, in place of a number of images; see `base_pace`
    base_pace: float = 374.0  # images that the base trains on in a second of the core whose minutes are counted
    data: str = "cifar10"
    settings: tuple[str, ...] = ()  # section.key=value, of every arm
    measures: Measures = OF_IMAGES

    def named(self, names: Iterable[str] | None) -> tuple[Arm, ...]:
        """Return the arms of these names, in the study's order; all when None. UserError for an unknown name."""
        wanted = None if names is None else list(names)
        unknown = set(wanted or ()) - {arm.name for arm in self.arms}
        if unknown:
            raise UserError(
                f"--arms {sorted(unknown)[0]!r}: no arm of this study; choose of: {', '.join(a.name for a in self.arms)}"
            )
        return tuple(arm for arm in self.arms if wanted is None or arm.name in wanted)


STUDIES = {
    "masking": Study("Masking strategies and the paper's other knobs", MASKING_ARMS, MASKING_PAPER),
    "small": Study("I-JEPA on small data", SMALL_ARMS, SMALL_PAPER),
    "minutes": Study("I-JEPA on small data, at equal CPU minutes", MINUTES_ARMS, MINUTES_PAPER, minutes=4),
    "dense": Study(
        "What patches know of rendered scenes",
        DENSE_ARMS,
        DENSE_PAPER,
        minutes=5,
        data="scenes",
        settings=DENSE_SETTINGS,
        measures=OF_PIXELS,
    ),
    "scaling": Study("Model size, data and epochs", SCALING_ARMS, SCALING_PAPER),
    "truncation": Study("What the cut of contexts costs", TRUNCATION_ARMS, TRUNCATION_PAPER, equal="flops"),
}


@dataclass(frozen=True)
class Sweep:
    """Request to train and probe arms of a study."""

    study: str  # a name in STUDIES
    output: Path  # folder of the arms' folders
    data: str
    seeds: int = 3
    budget: int | None = None  # images an arm sees; None: the study's
    arms: Sequence[str] | None = None  # names; None: all
    overrides: Sequence[str] = ()  # section.key=value, for every arm
    minutes: float | None = None  # that an arm trains for, in place of a number of images; None: the study's


class ArmJob(NamedTuple):
    """Job of an arm with a seed: all that its row depends on, and where it runs."""

    folder: Path
    asked: dict[str, Any]

    def beside(self, base: Config, pace: float) -> "ArmJob":
        """Return the job with the base, by whose pace in images/s its minutes are counted.

        The arm's pace over the base's is kept in a file that is named after what is trained, by both, but for the seed.
        """
        configs = [departures_from_default(config) for config in (config_from_dict(self.asked["config"]), base)]
        compared = {key: self.asked[key] for key in ("method", "data", "fraction")} | {"configs": configs}
        counted = {"base": base.to_dict(), "base_pace": pace, "pace_file": f"pace-{short_hash(compared)}.json"}
        return self._replace(asked=self.asked | counted)

    @property
    def row(self) -> Path:
        """The file of the job's row, which is there when the job has ended."""
        return self.folder / ROW_FILE

    @property
    def label(self) -> str:
        """The job's name for people."""
        return f"{self.asked['arm']}, seed {self.asked['seed']}"


def check_data(study: Study, data: str) -> None:
    """Raise UserError where the data lack what the study measures: once, rather than by every arm."""
    if study.measures is OF_PIXELS:
        rendered_pictures(data, SCENE_KINDS["segmentation"][0], "train")
    else:
        open_splits(data, None, None, 0)


def plan_jobs(sweep: Sweep) -> list[ArmJob]:
    """Return a job for every arm with every seed.

    All arms with one seed come before the next seed, so that a sweep that is stopped early can already be read.
    """
    study = STUDIES[sweep.study]
    budget = sweep.budget or study.budget
    minutes = None if sweep.budget else sweep.minutes or study.minutes
    check_overrides(sweep.overrides)
    if minutes and study.equal == "flops":
        raise UserError(f"--minutes: the study {sweep.study} gives its arms equal FLOPs; give --budget")
    jobs = []
    for seed in range(sweep.seeds):
        device = ("runtime.device=cpu",) if minutes else ()  # whose minutes they are
        shared = (f"data.source={sweep.data}", *device, *study.settings, *sweep.overrides, f"runtime.seed={seed}")
        # A seed draws masks of its own, and so has FLOPs of its own.
        plain = load_config(BASE_CONFIG, shared)
        base = flops_per_image(workload_of(with_teacher_shape(plain))) if study.equal == "flops" else 0.0
        for arm in study.named(sweep.arms):
            config = with_teacher_shape(load_config(BASE_CONFIG, (*shared, *arm.overrides)))
            share = base / flops_per_image(workload_of(config)) if base else 1.0
            if PROBED_INPUT[arm.method] != "target":
                length = {"images": 0}
            else:
                length = {"minutes": float(minutes * arm.length)} if minutes else {"images": round(budget * arm.length * share)}
            job = arm_job(sweep, arm, seed, length, config)
            jobs.append(job.beside(plain, study.base_pace) if "minutes" in length else job)
    return jobs


def check_overrides(overrides: Iterable[str]) -> None:
    """Raise UserError for a key that a sweep sets itself: it would be overwritten."""
    for key in (word.partition("=")[0] for word in overrides):
        if key in SET_BY_SWEEP:
            raise UserError(f"{key}: a sweep sets it itself; give --data, --seeds, --budget or --minutes")


def arm_job(sweep: Sweep, arm: Arm, seed: int, length: dict[str, float], config: Config) -> ArmJob:
    """Return the job of an arm with a seed that trains for a number of images, or of minutes.

    The name of its folder holds a hash of what is trained: with another override or budget it is another folder, and the
    same run in two studies is one.
    """
    asked = {"study": sweep.study, "arm": arm.name, "group": arm.group, "seed": seed, "method": arm.method, "paper": arm.paper,
             "data": sweep.data, "fraction": arm.fraction, "overrides": list(arm.overrides)} | length  # fmt: skip
    of_pixels = {"measured": "pixels"} if STUDIES[sweep.study].measures is OF_PIXELS else {}
    own, runtime = load_config(BASE_CONFIG).runtime, config.runtime
    changed = {key: getattr(runtime, key) for key in MEANINGFUL_RUNTIME if getattr(runtime, key) != getattr(own, key)}
    hashed = (
        {key: asked[key] for key in ("seed", "method", "data", "fraction", *length)}
        | of_pixels
        | {"config": departures_from_default(config)}
        | ({"runtime": changed} if changed else {})
        # What is set for all arms changes the base too, and so how many images the minutes buy.
        | ({"base": list(sweep.overrides)} if sweep.overrides and "minutes" in length else {})
    )
    digest = short_hash(hashed)
    folder = sweep.output / "runs" / f"{digest}-seed{seed}"
    return ArmJob(folder, asked | of_pixels | {"hash": digest, "config": config.to_dict()})


def short_hash(settings: dict[str, Any]) -> str:
    """Return twelve hexadecimal digits that stand for these settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def departures_from_default(config: Config) -> dict[str, dict[str, Any]]:
    """Return the settings that say what is trained and differ from the defaults, by section.

    Defaults are left out so that a key that is added later changes no hash.
    """
    default, given = Config().to_dict(), config.to_dict()
    return {name: {k: v for k, v in given[name].items() if v != default[name][k]} for name in MEANINGFUL_SECTIONS}


def job_rows(jobs: Iterable[ArmJob], kept: Path | None = None) -> list[dict[str, Any]]:
    """Return the rows of these jobs that exist in their folders or in the folder `kept`, under these arms' names."""
    found, stored = [], stored_rows(kept)
    for job in jobs:
        row = json.loads(job.row.read_text()) if job.row.is_file() else stored.get(job.asked["hash"])
        found += [row | {name: job.asked[name] for name in ("study", "arm", "group", "paper", "overrides")}] if row else []
    return found


def stored_rows(kept: Path | None) -> dict[str, dict[str, Any]]:
    """Return {hash of what was trained: row} of the rows that reports have written to a folder: studies share arms."""
    files = [kept / f"{name}.json" for name in STUDIES] if kept else []
    return {row["hash"]: row for file in files if file.is_file() for row in json.loads(file.read_text())}


def run_jobs(jobs: list[ArmJob], side_by_side: int, console: Console, kept: Path | None = None) -> list[str]:
    """Run the jobs that have no row yet, in their folders or in `kept`; return the labels of those that failed."""
    stored, failed = stored_rows(kept), []
    waiting = {job.folder: job for job in jobs if not (job.row.is_file() or job.asked["hash"] in stored)}.values()
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
            except BaseException:  # Ctrl-C, or a full disk: no other arm is begun
                pool.shutdown(wait=False, cancel_futures=True)
                children.stop()
                raise
    return failed


def jobs_progress(console: Console) -> Progress:
    """Return the bar that counts jobs; it is hidden where no terminal shows it."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal)


class RunningJobs:
    """Processes of the arms. SIGTERM to this process is passed on as Ctrl-C is: they save a checkpoint and end."""

    def __enter__(self) -> "RunningJobs":
        self.running: set[subprocess.Popen] = set()
        self._before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def run(self, job: ArmJob) -> int:
        """Run a job to its end in a process of its own, and return its exit code."""
        job.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(job.folder / JOB_FILE, json.dumps(job.asked, indent=1) + "\n")
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        command = [sys.executable, "-m", "fastjepa.studies.worker", str(job.folder)]
        with open(job.folder / "log.txt", "a") as log:
            child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            self.running.add(child)
            code = child.wait()
        self.running.discard(child)
        return code

    def stop(self) -> None:
        """Send SIGTERM to every process that runs."""
        for child in list(self.running):
            child.terminate()


def row_in_words(job: ArmJob, code: int) -> str:
    """Return a line about a job that has ended."""
    if not job.row.is_file():
        lines = (job.folder / "log.txt").read_text().splitlines() or ["it wrote nothing"]
        return f"{job.label}: failed with exit code {code}: {lines[-1]} ({job.folder / 'log.txt'})"
    row = json.loads(job.row.read_text())
    columns = STUDIES[row["study"]].measures.columns
    found = ", ".join(f"{one.title} {value:{one.form}}" for one in columns if (value := one.of(row)) is not None)
    return f"{job.label}: {found}; {row['images']:,} images, {row['cpu_seconds'] / 60:.1f} CPU min of steps here"
