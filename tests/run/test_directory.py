"""The run directory: one run at a time, on however many ranks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastjepa.cli.main import main
from fastjepa.errors import UserError
from fastjepa.ranks.world import check_launch
from fastjepa.run.directory import held_directory
from tests.support.places import BIN, ROOT
from tests.support.runs import trained, wait_for_steps

TASKS = ("WORLD_SIZE", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
LONG = "optimization.epochs=400"


def start(*command: object) -> subprocess.Popen:
    words = [str(word) for word in command]
    environment = {name: value for name, value in os.environ.items() if name not in TASKS} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def python(*command: object) -> subprocess.Popen:
    return start(sys.executable, "-m", "fastjepa.cli", *command)


@pytest.mark.slow
def test_a_second_run_is_refused_by_name_and_the_first_goes_on(toy_config, tmp_path, capsys):
    command = ["train", "--config", str(toy_config), "--output", str(tmp_path / "run"), "logging.every=1"]
    first = python(*command, LONG)
    try:
        wait_for_steps(tmp_path / "run", 2)
        for resume in ("auto", "must", "never"):
            assert main([*command, "--resume", resume]) == 2
            said = capsys.readouterr().err
            assert said.startswith(f"fastjepa train: {tmp_path}/run: a run is writing into it (process {first.pid} on ")
            assert said.count("\n") == 1 and "--output" in said
        assert not list((tmp_path / "run").glob("checkpoints.until-*")) and first.poll() is None
        assert main([*command[:4], str(tmp_path / "other"), "--max-steps", "1"]) == 0, "another directory is free"
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    trained(toy_config, tmp_path / "run", "--max-steps", 1, "--resume", "never")  # at once: loaders keep no lock


@pytest.mark.slow
def test_all_ranks_of_a_second_run_say_so(toy_config, tmp_path):
    with held_directory(tmp_path):
        command = ["--config", toy_config, "--output", tmp_path, "data.batch_size=4", "runtime.zero=0"]
        second = start(BIN / "torchrun", "--standalone", "--nproc_per_node", 2, "fastjepa/train.py", *command)
        assert second.communicate(timeout=200)[1].count(f"{tmp_path}: a run is writing into it (process {os.getpid()}") == 2
        assert second.returncode


def test_a_refused_run_leaves_no_directory_that_it_made(toy_config, tmp_path):
    words = ["train", "--config", str(toy_config), "data.batch_size=64", "--output"]
    assert main([*words, str(tmp_path / "new")]) == 2 and not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    assert main([*words, str(tmp_path / "old")]) == 2 and (tmp_path / "old").is_dir()


@pytest.mark.parametrize("way", ["a file", "below a file"])
def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, way: str):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" if way == "a file" else tmp_path / "file" / "run"
    with (
        pytest.raises(UserError, match=f"{output}: cannot be written .*another directory with --output"),
        held_directory(output),
    ):
        pass


@pytest.mark.parametrize("name", [*TASKS[1:], "MV2_COMM_WORLD_SIZE"])
def test_tasks_that_do_not_know_of_each_other_are_told_of_torchrun(name, toy_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(name, "2")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    command = ["train", "--config", str(toy_config), "--output", str(tmp_path / "run"), "--max-steps", "1"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"{name}=2 without WORLD_SIZE" in said and "torchrun" in said and not (tmp_path / "run").exists()
    counts = ["SLURM_STEP_NUM_TASKS"] if name.startswith("SLURM_N") else []  # a step of one task in a job of two
    for settled in ("WORLD_SIZE", name, *counts):
        with monkeypatch.context() as patched:
            patched.setenv(settled, "1")
            check_launch()
