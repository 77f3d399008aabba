"""Whole programs on a fake card: a run with its log, probes and checkpoints, evaluations, benchmarks."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from tests.support.fake_card import FakeCard  # before torch

import torch  # isort: skip

import breakdown
import gpu_hours
import protocol
import step as step_bench
import timing

from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import Config
from fastjepa.data.pixels import Pixels
from fastjepa.data.sources import open_source
from fastjepa.evals.features import extract_features
from fastjepa.evals.images import EvalImages
from fastjepa.evals.knn import Neighbours, knn_accuracy
from fastjepa.model.jepa import build_pair
from fastjepa.train import train
from tests.support.card_cases import tell_faults
from tests.support.evals import GREY, SMALL, write_images
from tests.support.runs import lines

CARD = torch.device("cuda:0")
READERS = {"build_run", "record", "save", "__init__"}  # of a run: what is made, the lines of its log with probes, checkpoints
WORDS = ("--device=cuda", "--dtype=bf16", "--batch=4", "--size=64")
TOY = ("data.loader=torch", "data.num_workers=0", "mask.patch_size=8", "mask.min_keep=0", "meta.depth=2", "meta.pred_depth=1")


def run_config(folder: Path) -> Config:
    """Return a run of two epochs of five steps over labelled images, with lines, probes and a checkpoint on the way."""
    source = {"source": str(write_images(folder / "images") / "train"), "batch_size": 8, "num_workers": 0, "loader": "torch"}
    return config_from_dict({
        **SMALL, "data": SMALL["data"] | source, "mask": SMALL["mask"] | {"min_keep": 0},
        "optimization": {"epochs": 2, "warmup": 1}, "runtime": {"dtype": "bf16", "device": "cuda"},
        "logging": {"every": 2, "monitor_every": 2, "probe_every": 4, "checkpoint_every": 5},
    })  # fmt: skip


def a_run(card: FakeCard, folder: Path) -> None:
    """Train, stop and go on: the host waits where a run is built, logged, probed or saved, nowhere else."""
    train(run_config(folder), folder / "run", max_steps=6)
    saved = train(run_config(folder), folder / "run")
    assert saved.name == "jepa-00000010" and len(list(saved.glob("*.safetensors"))) == 4
    logged = lines(folder / "run")
    steps = [line["step"] for line in logged]
    assert steps == sorted(set(steps)) and {1, 2, 4, 6, 8, 10} <= set(steps), logged
    assert {"effective_rank", "lidar", "knn"} <= {key for line in logged for key in line}, logged
    assert {reader for wait in card.waits for reader in wait.callers & READERS} == READERS
    elsewhere = {str(wait) for wait in card.waits if not wait.callers & READERS}
    assert not elsewhere, elsewhere


def features_of_images(card: FakeCard, folder: Path) -> None:
    """Extract features as evaluations do, and let them vote on the card."""
    target = build_pair(config_from_dict(SMALL | {"meta": SMALL["meta"] | {"depth": 4}}))[1]
    images = EvalImages(open_source(str(write_images(folder / "images") / "train")), (16, 16), Pixels(1))
    for layers, width in (("last", 32), ("concat4", 128)):
        found = extract_features(target, images, GREY, layers, CARD, torch.bfloat16)
        assert found.x.shape == (len(images), width) and found.x.device.type == "cpu"
    knn_accuracy(found, found, 2, device=CARD, vote=Neighbours(5))


def step_bench_rows(card: FakeCard, folder: Path) -> None:
    config = step_bench.to_config(step_bench.parse_options([*WORDS, "--model=vit_tiny", *TOY]))
    (row,) = step_bench.measure_step(config, 2)
    assert row["images_per_s"] > 0 and {"target forward", "optimizer", "EMA"} <= row["phases"].keys()
    assert {"data wait", "context backward", "step"} <= {one["part"] for one in breakdown.measure_parts(config, 2)}


def hours_bench_rows(card: FakeCard, folder: Path) -> None:
    words = [*WORDS, "--models=vit_tiny", "--rounds=2", "--methods=ijepa,mae", *TOY]
    for columns in ("packed,same", "packed,graph,views4,joint"):
        found = gpu_hours.measure_rows(gpu_hours.parse_options([*words, f"--columns={columns}"]))
        assert not found["not_measured"] and found["rows"], found
        assert all(row["images_per_s"] > 0 and row["share_of_datasheet"] > 0 for row in found["rows"])


def op_bench_times(card: FakeCard, folder: Path) -> None:
    """Time a call, a copy and products as the benches of the ops do: behind a short wait, by events."""
    assert timing.seconds_of(lambda: None, CARD) == 0.001  # what a fake event says of any two moments
    setting = protocol.Setting(CARD, toy=False)
    assert setting.copy_rate > 0 and setting.gemm_rate > 0 and setting.copies(1) == protocol.MOST_COPIES
    assert setting.randn(8, 4).device == setting.some(8, 3).device == CARD


CASES: dict[str, Callable[[FakeCard, Path], None]] = {
    one.__name__: one for one in (a_run, features_of_images, step_bench_rows, hours_bench_rows, op_bench_times)
}


def take_case(name: str) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(timing, "in_fresh_process", lambda call, *args: call(*args)),  # a process of its own sees no card
        FakeCard() as card,
    ):
        CASES[name](card, Path(folder))


if __name__ == "__main__":
    tell_faults(CASES, take_case)
