"""A process of its own for one trainer: `PeerProcess` starts it, in any environment that has torch, and asks it for steps.

A file of peer_steps/ defines `build(request)`, whose result takes a whole training step on batch `number` when it is called
with it. Its `phases(number)` takes one too and returns the milliseconds of each part. Requests and answers are pickled, over
a pipe, so that whatever a library prints meets nobody's answer.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np

from fastjepa.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds in which any answer must come


class Request(NamedTuple):
    """All that a step is built from; a peer's environment need not have the trainer's packages."""

    device: str
    dtype: str  # fp32, or bf16 by autocast
    threads: int
    shape: dict[str, Any]  # size, patch, width, depth, heads, mlp_ratio, predictor_width, predictor_depth
    batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]]  # images (B, C, H, W), contexts (B, L), blocks (R, B, K) int64
    optimizer: dict[str, float]  # lr, weight_decay, ema_momentum
    model: str
    numbers: list[int]  # of the trainer's batches that `batches` are
    config: dict[str, Any]  # of the trainer
    clone: str | None  # directory of the official code


class Failed(NamedTuple):
    """The answer of a process whose peer raised; the reason is one line."""

    reason: str


class PeerError(UserError):
    """A peer that cannot be built, or that no longer answers; the message is its reason."""


class PeerProcess(AbstractContextManager):
    """A peer in a process of its own; call it with the number of a batch for one step. Its process ends with the context."""

    def __init__(self, python: str, file: Path, request: Request):
        """Build the peer that `file` defines; PeerError where it cannot. `facts` has its memory, FLOPs and versions."""
        self.errors, self.pipe = TemporaryFile("w+", errors="replace"), Pipe()
        theirs = self.pipe[1]
        command = [python, __file__, str(file), str(theirs.fileno())]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        self.process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, pass_fds=[theirs.fileno()],
                                        stdin=subprocess.DEVNULL, stdout=self.errors, stderr=self.errors)  # fmt: skip
        theirs.close()
        try:
            self.facts = self.ask(request)
        except PeerError:
            self.__exit__()
            raise

    def __call__(self, number: int) -> float:
        """Take one step; return its loss."""
        return self.ask(("step", number))

    def phases(self, number: int) -> dict[str, float]:
        return self.ask(("phases", number))

    def ask(self, request: object) -> Any:
        try:
            self.pipe[0].send(request)
            if not self.pipe[0].poll(PATIENCE):
                raise PeerError(f"no answer in {PATIENCE} seconds")
            answer = self.pipe[0].recv()
        except (EOFError, OSError) as error:
            raise PeerError(f"its process ended: {self.last_line()}") from error
        if isinstance(answer, Failed):
            raise PeerError(answer.reason)
        return answer

    def last_line(self) -> str:
        self.errors.seek(0)
        return next((line.strip() for line in reversed(self.errors.readlines()) if line.strip()), "it printed nothing")

    def __exit__(self, *error: object) -> None:
        """End the process: it leaves when its pipe is closed, and is killed where it does not."""
        self.pipe[0].close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()


def serve(file: str, connection: Connection) -> None:
    """Build the peer of a file and answer requests until the other end of the pipe is closed."""
    import timing
    import torch

    try:
        request: Request = connection.recv()
        torch.set_num_threads(request.threads)
        torch.manual_seed(0)
        spec = importlib.util.spec_from_file_location("peer", file)
        peer = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(peer)
        device = torch.device(request.device)
        run, peak = timing.built_at_peak(lambda: peer.build(request), device, len(request.batches))
        connection.send({
            "peak_bytes": peak, "process_bytes": timing.resident_bytes("VmHWM"), "torch": torch.__version__,
            "flops": [counted_flops(run, number) for number in range(len(request.batches))],
        })  # fmt: skip
        answers = {"step": lambda number: float(run(number)), "phases": lambda number: run.phases(number)}
        while True:
            what, number = connection.recv()
            answer = answers[what](number)
            timing.synchronize(device)
            connection.send(answer)
    except EOFError:
        return
    except Exception as error:  # whatever a library raises is the reason why it has no row
        connection.send(Failed(f"{type(error).__name__}: {error}".splitlines()[0]))


def counted_flops(run: Callable[[int], object], number: int) -> int:
    """Return the FLOPs of a step as torch counts them, attention by its products: the counter knows no fused one of a CPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with ExitStack() as entered:
        entered.enter_context(sdpa_kernel(SDPBackend.MATH))
        counter = entered.enter_context(FlopCounterMode(display=False))
        run(number)
    return counter.get_total_flops()


if __name__ == "__main__":
    import peer_process  # by its name: classes of __main__ would mean nothing to the process that unpickles them

    peer_process.serve(sys.argv[1], Connection(int(sys.argv[2])))
