"""A run that is told to stop, or that loses its loader: it ends in time, with one sentence, and names its last checkpoint."""

import os
import signal
import time
from pathlib import Path

import pytest

from fastjepa import train
from fastjepa.cli.main import main
from fastjepa.loader.micro_batches import MicroBatches
from fastjepa.run import stop
from tests.support import ranks
from tests.support.ranks import Process
from tests.support.runs import lines, wait_for_steps


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def begun(config: Path, output: Path, *settings: str, steps: int = 3) -> Process:
    """Start a long run that saves at every second step, and wait for some steps."""
    process = ranks.command("train", "--config", config, "--output", output, "optimization.epochs=2000",
                            "logging.checkpoint_every=2", "logging.monitor_every=0", *settings)  # fmt: skip
    wait_for_steps(output, steps)
    return process


def told(process: Process, code: int, seconds: float = ranks.SECONDS) -> str:
    """Return the one sentence that a run ended with, and see that it ended in time."""
    began = time.monotonic()
    assert process.wait() == code, process.stderr
    assert time.monotonic() - began < seconds
    assert "Traceback" not in process.stderr
    (sentence,) = [line for line in process.stderr.splitlines() if line.startswith("fastjepa train: ")]
    return sentence


def newest(output: Path) -> str:
    return f"the last good checkpoint is {max((output / 'checkpoints').glob('jepa-*'))}"


@pytest.mark.parametrize("loader", ["torch", pytest.param("dali", marks=pytest.mark.slow)])
def test_a_killed_loader_process_ends_the_run_with_its_last_checkpoint(toy_config, tmp_path, loader):
    process = begun(toy_config, tmp_path, f"data.loader={loader}")
    os.kill(children(process.pid)[0], signal.SIGKILL)
    said = told(process, 1)
    assert "was killed by SIGKILL" in said and "data.num_workers (1) or data.prefetch (2)" in said
    assert said.endswith(newest(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_that_waits_for_data_within_5_seconds(toy_config, tmp_path, number, code):
    process = begun(toy_config, tmp_path)
    os.kill(children(process.pid)[0], signal.SIGSTOP)
    time.sleep(1)
    os.kill(process.pid, number)
    said = told(process, code, seconds=6.0)  # five, and one for a busy machine
    assert f"stopped by {number.name} while it waited for data" in said and said.endswith(newest(tmp_path))
    assert "resuming from" in _again(toy_config, tmp_path)


def _again(config: Path, output: Path) -> str:
    process = ranks.command("train", "--config", config, "--output", output, "--max-steps", len(lines(output)) + 2,
                            "optimization.epochs=2000", "logging.monitor_every=0")  # fmt: skip
    ranks.succeeded([process])
    return process.stdout


@pytest.mark.slow
def test_a_signal_before_the_first_micro_batch_ends_the_run(toy_config, tmp_path):
    process = ranks.begin(train_with, "hang", "--config", str(toy_config), "--output", str(tmp_path), "data.num_workers=1")
    until = time.monotonic() + 60
    while "starting a new run" not in process.stdout:
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert told(process, 143, seconds=6.0).endswith("no checkpoint was written yet")


def train_with(fault: str, *words: str) -> int:
    """Train with a fault: data that never comes, or a step that takes a minute."""
    if fault == "hang":
        MicroBatches.__getitem__ = lambda self, item: time.sleep(60)
    if fault == "long step":
        real, train.jepa_loss = train.jepa_loss, lambda *given: time.sleep(60) or real(*given)
    if fault == "long save":
        real, train.save_checkpoint = train.save_checkpoint, lambda *given: time.sleep(60) or real(*given)
    return main(["train", *words, "logging.checkpoint_every=2"])


@pytest.mark.slow
def test_data_read_in_the_training_process_itself_is_given_up(toy_config, tmp_path):
    process = ranks.begin(train_with, "hang", "--config", str(toy_config), "--output", str(tmp_path), "data.num_workers=0",
                          "runtime.timeout=1")  # fmt: skip
    assert "no micro-batch could be read in 1 s (runtime.timeout); look at the storage of the data" in told(process, 1, 30.0)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["long step", "long save"])
def test_a_second_signal_ends_whatever_the_run_does(toy_config, tmp_path, fault):
    process = ranks.begin(train_with, fault, "--config", str(toy_config), "--output", str(tmp_path), "data.num_workers=0")
    until = time.monotonic() + 60
    while "starting a new run" not in process.stdout:
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(1)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(1.2)
    assert process.poll() is None, "one signal lets a step and a checkpoint end"
    os.kill(process.pid, signal.SIGTERM)
    assert "ended at once by a second signal, SIGTERM" in told(process, 143, seconds=3.0)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_ranks_say_whose_loader_died_and_why(toy_config, tmp_path, victim):
    two = ranks.train(2, "--config", toy_config, "--output", tmp_path, "data.batch_size=4", "optimization.epochs=2000",
                      "logging.monitor_every=0")  # fmt: skip
    wait_for_steps(tmp_path, 3)
    os.kill(children(two[victim].pid)[0], signal.SIGKILL)
    codes = [process.returncode for process in ranks.ended(two)]
    assert codes[victim] == 1 and "was killed by SIGKILL" in two[victim].stderr
    assert codes[1 - victim] == 75 and f"rank {victim} (process" in two[1 - victim].stderr
    assert "was killed by SIGKILL" in two[1 - victim].stderr


@pytest.mark.slow
def test_a_stalled_loader_ends_every_rank_with_its_cause(toy_config, tmp_path):
    two = ranks.train(2, "--config", toy_config, "--output", tmp_path, "data.batch_size=4", "optimization.epochs=2000",
                      "logging.monitor_every=0", "runtime.timeout=4")  # fmt: skip
    wait_for_steps(tmp_path, 3)
    os.kill(children(two[1].pid)[0], signal.SIGSTOP)
    codes = [process.returncode for process in ranks.ended(two)]
    assert codes == [75, 1], [process.stderr for process in two]
    assert all("delivered nothing for 4 s (runtime.timeout)" in process.stderr for process in two)


def test_a_signal_that_comes_while_ranks_agree_counts_at_the_next_step(monkeypatch):
    """The answer of the other ranks, who were not asked, must not take it back."""
    asked = stop.Stop(60.0, lambda: "")
    monkeypatch.setattr(stop, "max_over_ranks", lambda number: asked._note(signal.SIGTERM, None) or number)
    assert not asked.agreed() and asked.received == signal.SIGTERM
    monkeypatch.setattr(stop, "max_over_ranks", lambda number: number)
    assert asked.agreed() and asked.received == signal.SIGTERM
