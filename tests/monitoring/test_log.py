"""Logs that survive a resume and rates that are arithmetic."""

import json
import math
import os
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.monitoring import log as log_module
from fastjepa.monitoring.log import Log, Peak
from fastjepa.monitoring.machine import GEMM_SHAPES, gemm_rate
from fastjepa.monitoring.skips import Skips


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless told: clock.now += seconds."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(log_module.time, "perf_counter", lambda: Clock.now)
    monkeypatch.setattr(log_module.time, "process_time", lambda: Clock.now / 4)  # of which this process has a quarter
    return Clock


def open_log(output, **changes) -> Log:
    settings = {"total_steps": 100, "every": 1, "peak": Peak(2e9, 1e11), "sinks": ()}
    return Log(output, **settings | changes)


def lines(output) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def values(**changes) -> dict:
    return {"loss": 0.5, "lr": 1e-3, "weight_decay": 0.04, "ema_momentum": 0.996, "context_tokens": 68.0,
            "target_tokens": 116.0, "skipped": 0} | changes  # fmt: skip


def test_a_line_has_every_promised_field(tmp_path):
    with open_log(tmp_path) as log:
        log.step(1, 0, values(loss=torch.tensor(0.25)), images=8)
    (entry,) = lines(tmp_path)
    computed = {"step", "epoch", "images_per_s", "cpu_s", "mfu", "memory_gib"}
    assert computed | set(values()) == set(entry)
    assert entry["step"] == 1 and entry["loss"] == 0.25 and entry["memory_gib"] > 0


def test_rate_and_mfu_are_over_the_steps_since_the_last_line_without_pauses(tmp_path, clock):
    with open_log(tmp_path, every=2) as log:
        for step in (1, 2, 3, 4):
            clock.now += 2.0
            if step == 3:
                with log.pause():
                    clock.now += 50.0
                    with log.pause():  # an evaluation inside a checkpoint
                        clock.now += 50.0
            log.step(step, 0, values(), images=20 if step > 2 else 10)
    first, second = lines(tmp_path)
    assert (first["step"], second["step"]) == (2, 4)
    assert first["images_per_s"] == pytest.approx(20 / 4) and second["images_per_s"] == pytest.approx(40 / 4)
    assert first["cpu_s"] == pytest.approx(1) and second["cpu_s"] == pytest.approx(1)
    assert second["mfu"] == pytest.approx(10 * 2e9 / 1e11)


def test_values_on_the_device_are_read_only_when_a_line_is_due(tmp_path, monkeypatch, clock):
    reads = []
    read = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append(1) or read(self))
    with open_log(tmp_path, every=3, total_steps=4) as log:
        for step in range(1, 5):
            clock.now += 0.5
            log.step(step, 0, {"loss": torch.tensor(1.0)}, images=1)
    written = lines(tmp_path)
    assert [entry["step"] for entry in written] == [3, 4] and len(reads) == 2
    assert written[0]["images_per_s"] == pytest.approx(3 / 1.5)


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    with open_log(tmp_path, peak=Peak(2e9, 0.0)) as log:
        log.step(1, 0, values(loss=torch.tensor(math.nan), lr=math.inf), images=1)
    (entry,) = lines(tmp_path)
    assert entry["loss"] is None and entry["lr"] is None and entry["mfu"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_resume_drops_later_and_torn_lines_and_goes_on(tmp_path):
    with open_log(tmp_path) as log:
        for step in range(1, 8):
            log.step(step, 0, values(loss=float(step)), images=1)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "lo')
    with open_log(tmp_path, start_step=4) as log:
        for step in range(5, 7):
            log.step(step, 0, values(loss=-1.0), images=1)
    assert [(entry["step"], entry["loss"]) for entry in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, -1), (6, -1)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_cut_that_is_interrupted_leaves_the_old_file(tmp_path, monkeypatch):
    with open_log(tmp_path) as log:
        for step in range(1, 4):
            log.step(step, 0, values(), images=1)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), open_log(tmp_path, start_step=1):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_held_values_reach_the_next_line_alone_and_a_resume_keeps_the_entries(tmp_path, capsys):
    with open_log(tmp_path, sinks=["console"], every=2) as log:
        assert log.kept == [] and log.writes
        log.hold({"knn": 0.25, "feature_std": 9.0})
        log.hold({"feature_std": 0.5})
        for step in range(1, 5):
            log.step(step, 0, values(), images=1)
    first, second = lines(tmp_path)
    assert (first["knn"], first["feature_std"]) == (0.25, 0.5) and not {"knn", "feature_std"} & second.keys()
    shown = capsys.readouterr().out.splitlines()
    assert "std 0.500" in shown[0] and "k-NN 25.0%" in shown[0] and "k-NN" not in shown[1]
    with open_log(tmp_path, start_step=3) as log:
        assert log.kept == [first]


def test_plain_lines_without_a_terminal(tmp_path, capsys, clock):
    with open_log(tmp_path, sinks=["console"], every=2) as log:
        for step in (1, 2, 3):
            clock.now += 1.0
            log.step(step, 0, values(skipped=3), images=4)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1
    for part in (
        "step 2/100",
        "loss 0.5000",
        "lr 1.00e-03",
        "momentum 0.9960",
        "img/s 4.0",
        "MFU 8.0%",
        "GiB",
        "skipped 3",
        "ETA 0:01:38",
    ):
        assert part in out[0]


def test_a_terminal_gets_one_line_that_moves(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    with open_log(tmp_path, sinks=["console"], every=1) as log:
        log.message("checkpoint [saved]")  # no markup: brackets are text
        log.step(7, 0, values(), images=4)
    out = capsys.readouterr().out
    assert "checkpoint [saved]" in out
    assert all(part in out for part in ("step 7/100", "loss 0.5000", "GiB", "ETA")) and "…" not in out


def test_a_log_without_output_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with open_log(None, sinks=("console", "tensorboard")) as log:
        log.hold({"knn": 0.5})
        log.step(1, 0, values(), images=1)
        log.message("unseen")
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == "" and not log.due(1) and not log.writes


def test_tensorboard_events_where_it_is_installed(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, directory, purge_step):
            written.append((directory.name, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    tensorboard = type(sys)("torch.utils.tensorboard")
    tensorboard.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setattr(log_module.importlib.util, "find_spec", lambda name: object())
    with open_log(tmp_path, sinks=["tensorboard"], start_step=4) as log:
        log.step(5, 0, values(lr=math.nan), images=1)
    assert written[0] == ("tensorboard", 5) and written[-1] == "closed"
    assert ("loss", 0.5, 5) in written and not any(entry[0] == "lr" for entry in written)
    monkeypatch.setattr(log_module.importlib.util, "find_spec", lambda name: None)
    written.clear()
    with open_log(tmp_path, sinks=["tensorboard"]) as log:
        log.step(1, 0, values(), images=1)
    assert written == []


def test_gemm_rate_is_flops_over_seconds(monkeypatch):
    monkeypatch.setitem(GEMM_SHAPES, "cpu", ((64, 32, 128),))
    ticks = iter([0.0, 1.0, 1.5, 9.0])  # deadline, start, end, stop
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: next(ticks))
    assert gemm_rate(torch.device("cpu"), torch.float32) == 2 * 64 * 32 * 128 / 0.5


@given(st.lists(st.booleans(), max_size=30), st.integers(0, 5))
def test_skips_count_as_a_loop_would(finite, already):
    skips = Skips(torch.device("cpu"), total=already, in_row=already, step=7)
    total, in_row = already, already
    for good in finite:
        skips.update(torch.tensor(good))
        total, in_row = total + (not good), 0 if good else in_row + 1
    assert skips.poll() == skips.sync() == (total, in_row, 7 + len(finite))


def test_poll_answers_a_fixed_number_of_steps_late(monkeypatch):
    class Event:
        def record(self):
            pass

        def synchronize(self):
            pass

    skips = Skips(torch.device("cpu"))
    skips._asynchronous = True  # the CUDA path
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for step in range(1, 20):
        skips.update(torch.tensor(False))
        late = max(0, step - Skips.LAG)
        assert skips.poll() == (late, late, late)
        assert skips.sync() == (step, step, step)


@pytest.mark.gpu
def test_skips_never_wait_for_the_gpu():
    skips = Skips(torch.device("cuda"))
    finite = torch.tensor(False, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(Skips.LAG + 5):
            skips.update(finite)
            skips.poll()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert skips.poll() == (5, 5, 5)
    assert skips.sync() == (Skips.LAG + 5,) * 3
