"""The recipes of docs/multi-gpu.md, run as written: two hosts, elastic restarts, SLURM, and a launcher that is told to stop."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.support.places import BIN, ROOT
from tests.support.ranks import port
from tests.support.runs import lines, losses, trained, wait_for_steps

LAUNCH = ROOT / "configs/launch"
LONG = "optimization.epochs=160"  # 800 steps: none ends before a signal has come, however slowly
HALF = ["data.batch_size=4", "runtime.zero=0"]  # on each of two ranks; launching is the same with DeepSpeed, only slower
pytestmark = pytest.mark.xdist_group("launch")  # one launcher at a time: they are timed, and start many processes
GRACE = 30  # seconds between SIGTERM and SIGKILL


@pytest.fixture(scope="module")
def expected(toy_config, tmp_path_factory) -> Callable[[int], list[float]]:
    """The losses of the first `steps` steps of one process, never interrupted."""

    @cache
    def alone(steps: int) -> list[float]:
        return losses(trained(toy_config, tmp_path_factory.mktemp("one"), LONG, "--max-steps", steps))

    return alone


def start(*command: object, **variables: str) -> subprocess.Popen:
    path = f"{BIN}:{os.environ['PATH']}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path} | variables
    words = [str(word) for word in command]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, **streams)


def end(process: subprocess.Popen, seconds: float = 240) -> str:
    """Return what it said, when it has ended."""
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def training(output: Path) -> list[int]:
    """The processes that train into `output`, launchers and loaders not counted, the last to start last."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = path.read_bytes().split(b"\0") if path.exists() else []
        if b"fastjepa/train.py" in words[1:3] and str(output).encode() in words:
            found.append(int(path.parent.name))
    return sorted(pid for pid in found if parent(pid) not in found)


def parent(process: int) -> int:
    return int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1])


TORCHRUN = [BIN / "torchrun", "--standalone", "--nproc_per_node", 2]
DEEPSPEED = [BIN / "deepspeed", "--num_accelerators", 2]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "send"), [(TORCHRUN, os.kill), (DEEPSPEED, os.killpg)], ids=["torchrun", "deepspeed"])
def test_sigterm_to_the_launcher_saves_and_the_run_goes_on(toy_config, expected, tmp_path, launcher, send: Callable):
    """`deepspeed` does not hand SIGTERM on to its ranks, so it goes to the process group, as from SLURM or systemd."""
    command = [*launcher, *(["--master_port", port()] if launcher is DEEPSPEED else []), "fastjepa/train.py"]
    process = start(*command, "--config", toy_config, "--output", tmp_path, LONG, *HALF)
    wait_for_steps(tmp_path, 3)
    send(process.pid, signal.SIGTERM)
    asked = time.monotonic()
    said = end(process)
    took = time.monotonic() - asked
    assert took < GRACE, f"{took:.0f} s"
    assert process.returncode != 0, "launchers report a run that was told to stop as one that failed"
    step = int(re.search(r"stopped by SIGTERM after step (\d+) of 800", said)[1])
    assert 3 <= step < 800
    assert (tmp_path / f"checkpoints/jepa-{step:08d}").is_dir()
    assert len(lines(tmp_path)) == step
    assert losses(trained(toy_config, tmp_path, LONG, "--max-steps", step + 5)) == pytest.approx(expected(step + 5), rel=1e-5)


@pytest.mark.slow
def test_the_script_alone_gives_the_same_run(toy_config, expected, tmp_path):
    """`--local_rank` is what `deepspeed` appends."""
    process = start(sys.executable, "fastjepa/train.py", "--local_rank=0", "--config", toy_config, "--output", tmp_path,
                    LONG, "--max-steps", 10)  # fmt: skip
    said = end(process)
    assert process.returncode == 0, said
    assert losses(lines(tmp_path)) == expected(10)


@pytest.mark.slow
def test_torchrun_restarts_the_run_of_a_killed_rank_by_itself(toy_config, expected, tmp_path):
    """At the first attempt: one restart is all there is."""
    process = start(*TORCHRUN, "--max-restarts", 1, "fastjepa/train.py", "--config", toy_config, "--output", tmp_path,
                    LONG, *HALF, "runtime.timeout=20", "--max-steps", 80)  # fmt: skip
    wait_for_steps(tmp_path, 12)
    victim = training(tmp_path)[-1]
    os.kill(victim, signal.SIGKILL)
    said = end(process)
    assert process.returncode == 0, said
    assert len(re.findall(rf"rank [01] \(process {victim} on .+\) has given no sign of life after step \d+", said)) == 1, said
    assert re.search(r"resuming from \S+/jepa-\d{8}", said)
    assert losses(lines(tmp_path)) == pytest.approx(expected(80), rel=1e-5)


def two_hosts(*command: object) -> list[str]:
    """The same command, with --node_rank 0 and 1, as it is given on two machines."""
    place = command.index("fastjepa/train.py")
    hosts = [start(*command[:place], "--node_rank", rank, *command[place:]) for rank in range(2)]
    said = [end(host) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    return said


@pytest.mark.slow
def test_two_torchrun_nodes_give_the_run_of_one_process(toy_config, expected, tmp_path):
    two_hosts(BIN / "torchrun", "--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port(),
              "fastjepa/train.py", "--config", toy_config, "--output", tmp_path, "--max-steps", 80, LONG, *HALF)  # fmt: skip
    assert losses(lines(tmp_path)) == pytest.approx(expected(80), rel=1e-5)


@pytest.mark.slow
def test_two_deepspeed_hosts_without_ssh_give_the_run_of_one_process(toy_config, expected, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    two_hosts(BIN / "deepspeed", "--no_ssh", "--hostfile", hostfile, "--master_addr", "127.0.0.1", "--master_port", port(),
              "fastjepa/train.py", "--config", toy_config, "--output", tmp_path / "run", "--max-steps", 10, LONG,
              HALF[0], "runtime.zero=1")  # fmt: skip
    assert losses(lines(tmp_path / "run")) == pytest.approx(expected(80)[:10], rel=1e-5)


STAND_INS = {
    # What these commands do where there is one node and no SLURM.
    "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": '#!/bin/bash\n[ "$1 $2" = "show hostnames" ] && echo localhost\necho "$@" >> "$SLURM_SUBMIT_DIR/asked"\n',
}


@pytest.fixture
def slurm(tmp_path) -> Callable[..., subprocess.Popen]:
    """Starts the SLURM script as a batch job on one node of two ranks."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "fastjepa").symlink_to(ROOT / "fastjepa")
    variables = {"PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "17",
                 "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2",
                 "RENDEZVOUS_PORT": str(port())}  # fmt: skip
    return lambda *arguments, **more: start("bash", LAUNCH / "slurm.sh", *arguments, **variables, **more)


@pytest.mark.slow
def test_a_preempted_slurm_job_saves_and_goes_back_into_the_queue_and_on(toy_config, expected, tmp_path, slurm):
    command = ["--config", toy_config, "--output", tmp_path / "run", LONG, *HALF]
    job = slurm(*command)
    wait_for_steps(tmp_path / "run", 3)
    job.send_signal(signal.SIGUSR1)  # to the batch shell alone: --signal=B:USR1@120
    said = end(job, 100)
    assert job.returncode == 0, said
    assert (stopped := re.search(r"stopped by SIGTERM after step (\d+) of 800", said)), said
    assert "requeue 17" in (tmp_path / "asked").read_text()
    until = int(stopped[1]) + 5
    again = slurm(*command, "--max-steps", until)
    said = end(again)
    assert again.returncode == 0, said
    assert f"stopped after step {until} of 800" in said
    assert (tmp_path / "asked").read_text().count("requeue") == 1, "a job that has finished is not requeued"
    assert losses(lines(tmp_path / "run")) == pytest.approx(expected(until), rel=1e-5)


@pytest.mark.slow
def test_a_slurm_job_that_fails_reports_it(toy_config, tmp_path, slurm):
    job = slurm("--config", toy_config, "--output", tmp_path / "run", "data.batch_size=64", MAX_RESTARTS="1")
    said = end(job)
    assert job.returncode != 0
    assert said.count("fewer than one global batch of 128") == 4, f"two ranks, started twice: {said}"
    assert "requeue" not in (tmp_path / "asked").read_text()


def test_the_slurm_script_is_bash_and_the_hostfile_deepspeeds(tmp_path):
    assert subprocess.run(["bash", "-n", LAUNCH / "slurm.sh"]).returncode == 0
    code = "from deepspeed.launcher.runner import fetch_hostfile; import sys; print(dict(fetch_hostfile(sys.argv[1])))"
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code, LAUNCH / "hostfile"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "{'node-01': 8, 'node-02': 8}"
