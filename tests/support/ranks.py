"""Processes of tests, alone or as the ranks of a run: forked from one server a pytest process, never left behind."""

import contextlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

from fastjepa.cli.main import main
from tests.support.places import ROOT
from tests.support.server import Request

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SECONDS = 240.0  # that a process may take, on a loaded machine too


class Process:
    """A forked process; `pid` is also its process group, which its loader's workers share."""

    def __init__(self, work: tuple, argv: list[str], environment: dict[str, str], cwd: Path, files: tuple[Path, Path]):
        self.args, self.returncode, self._files = argv, None, files
        request = Request(pickle.dumps(work), argv, environment, str(cwd), *map(str, files))
        self.pid: int = _ask(request)
        self._handle = os.pidfd_open(self.pid)

    @property
    def stdout(self) -> str:
        return self._files[0].read_text()

    @property
    def stderr(self) -> str:
        return self._files[1].read_text()

    def poll(self, seconds: float = 0.0) -> int | None:
        """Return the exit code, or None when `seconds` have passed and it still runs."""
        if self.returncode is None and select.select([self._handle], [], [], seconds)[0]:
            self.returncode = _ask(self.pid)
            os.close(self._handle)
            self.signal(signal.SIGKILL)  # what it left behind
        return self.returncode

    def wait(self, seconds: float = SECONDS) -> int:
        """Return the exit code; kill the process, and fail, when it takes longer than `seconds`."""
        if self.poll(seconds) is None:
            self.signal(signal.SIGKILL)
            self.poll(SECONDS)
            raise AssertionError(f"{self.args} took more than {seconds:g} s and was killed:\n{self.stdout}{self.stderr}")
        return self.returncode

    def signal(self, number: int) -> None:
        """Send a signal to the process and all it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


@cache
def _server() -> Connection:
    """Start the server, in a session of its own, so that Ctrl-C ends pytest and the end of pytest ends the server."""
    ours, theirs = socket.socketpair()
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = f"import sys; from tests.support.server import main; sys.exit(main({theirs.fileno()}))"
    with theirs:
        environment = os.environ | {"PYTHONPATH": path}
        words = [sys.executable, "-c", code]
        subprocess.Popen(words, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], start_new_session=True)
    return Connection(ours.detach())


def _ask(request: Request | int) -> int:
    _server().send(request)
    return _server().recv()


def port() -> int:
    """Return a TCP port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environments(count: int, world: int | None = None) -> list[dict[str, str]]:
    """Return what a launcher would tell each of `count` ranks that meet at a free port."""
    place = ("127.0.0.1", port())
    return [dict(zip(LAUNCHER, map(str, (rank, rank, world or count, *place)), strict=True)) for rank in range(count)]


def begin(function: Callable, *arguments: object, cwd: Path = ROOT, argv: list[str] | None = None, **variables: str) -> Process:
    """Start an importable function in a process of its own; `variables` are added to the environment."""
    files = Path(tempfile.mkdtemp(prefix="process-", dir=_scratch().name))
    streams = files / "out", files / "err"
    for file in streams:
        file.touch()
    environment = os.environ | {"DS_ACCELERATOR": "cpu"} | variables
    return Process((function, arguments), argv or [function.__name__], environment, cwd, streams)


def command(*words: object, **variables: str) -> Process:
    """Start `fastjepa WORDS` in a process of its own."""
    argv = [str(word) for word in words]
    return begin(main, argv, argv=["fastjepa", *argv], **variables)


def start(function: Callable, *arguments: object, count: int = 2, world: int | None = None, **variables: str) -> list[Process]:
    """Start an importable function on `count` ranks of one machine."""
    return [begin(function, *arguments, **environment, **variables) for environment in environments(count, world)]


def run(function: Callable, *arguments: object, **how: object) -> list[Process]:
    """Run an importable function on ranks, as `start` does, each of which must succeed."""
    return succeeded(start(function, *arguments, **how))


def train(count: int, *arguments: object, function: Callable = main, **variables: str) -> list[Process]:
    """Run `fastjepa train` on `count` ranks as torchrun would; `function` is called with its words in place of `cli.main`."""
    words = ["train", *map(str, arguments)]
    return [begin(function, words, argv=["fastjepa", *words], **place, **variables) for place in environments(count)]


def ended(processes: list[Process], seconds: float = SECONDS) -> list[Process]:
    """Wait for all; the first that fails to end in time ends them all."""
    until = time.monotonic() + seconds
    try:
        for process in processes:
            process.wait(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            process.signal(signal.SIGKILL)
    return processes


def succeeded(processes: list[Process], seconds: float = SECONDS) -> list[Process]:
    """Wait for all, and fail with all that was said unless each exit code is 0."""
    codes = [process.returncode for process in ended(processes, seconds)]
    assert not any(codes), f"{codes}\n" + "".join(f"{process.stdout}{process.stderr}\n" for process in processes)
    return processes


@cache
def _scratch() -> tempfile.TemporaryDirectory:
    """Return a directory for what processes print; it goes with this process."""
    return tempfile.TemporaryDirectory(prefix="fastjepa-tests-")
