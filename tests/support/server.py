"""A process that has imported torch, DeepSpeed and fastjepa, and forks for each request a process that goes on from there.

The server is single-threaded, opens no process group and uses no random number, so a fork of it is as good as a fresh
interpreter, 3 seconds of imports earlier. A forked process runs its work after the server's loop, at the top of the
program, and so ends as any Python process does: exit code, traceback, atexit, threads waited for.
"""

import contextlib
import gc
import importlib
import os
import pickle
import signal
import sys
from multiprocessing.connection import Connection
from typing import NamedTuple

# torch's optimizers import torch._dynamo when the first is made, and DeepSpeed's Muon, which nobody here uses, Inductor.
IMPORTED = (
    "fastjepa.cli",
    "fastjepa.train",
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.original_muon",
    "pytest",
    "hypothesis",
)


class Request(NamedTuple):
    """A process to fork."""

    work: bytes  # a pickled pair: an importable function and its arguments
    argv: list[str]
    environment: dict[str, str]
    cwd: str
    out: str  # files that its standard output and error go to; may be the same
    err: str


def serve(connection: Connection) -> Request | None:
    """Answer until the client is gone; return in a forked process what it shall do, and None in the server itself."""
    alive: set[int] = set()
    while True:
        try:
            asked = connection.recv()
        except (EOFError, ConnectionError):
            break
        if isinstance(asked, Request):
            pid = os.fork()
            if pid == 0:
                connection.close()
                return asked
            alive.add(pid)
            connection.send(pid)
        else:
            connection.send(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]))
            alive.discard(asked)
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return None


def become(request: Request) -> None:
    """Take the request's environment, directory, streams and arguments, and lead a session of its own."""
    os.setsid()
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.cwd)
    sys.argv = request.argv
    for path, stream in ((os.devnull, 0), (request.out, 1), (request.err, 2)):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, stream)
        os.close(file)


def main(handle: int) -> object:
    """Serve the client at the other end of a socket; in a forked process, do its work and return what it returns."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no collection in a fork walks through, and so copies, what was imported
    assert len(os.listdir("/proc/self/task")) == 1, "a thread does not live on in a fork, and a lock it holds stays locked"
    request = serve(Connection(handle))
    if request is None:
        return None
    become(request)
    function, arguments = pickle.loads(request.work)
    return function(*arguments)
