"""A process of its own for one trainer: `PeerProcess` starts it, in any environment that has torch, and asks it for steps.

A file of peer_steps/ defines `build(request)`. Its result takes a whole training step on batch `number` when it is called with
it; its `phases(number)` takes one too and returns the milliseconds of each part. Requests and answers are pickled over a pipe,
so that whatever a library prints meets nobody's answer.
"""

import importlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np

from fastjepa.errors import UserError

HERE = Path(__file__).resolve().parent
PATIENCE = 900  # seconds in which any answer must come, on a busy machine too


class Request(NamedTuple):
    """All that a step is built from; a peer's environment need not have the trainer's packages."""

    name: str  # of the row
    module: str  # of peer_steps/
    package: str  # the distribution whose version is reported, if any
    device: str
    dtype: str  # fp32, or bf16 by autocast
    threads: int
    shape: dict[str, Any]  # size, patch, width, depth, heads, mlp_ratio, predictor_width, predictor_depth
    rates: dict[str, float]  # lr, weight_decay, ema_momentum
    batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]]  # images (B, C, H, W), contexts (B, L), blocks (R, B, K) int64
    numbers: list[int]  # of the trainer's batches that `batches` are
    config: dict[str, Any]  # of the trainer
    clone: str | None  # directory of the official code


class Failed(NamedTuple):
    """The answer of a process whose peer raised; the reason is one line."""

    reason: str


class PeerError(UserError):
    """A peer that cannot be built, or that no longer answers; the message is its reason."""


class PeerProcess(AbstractContextManager):
    """A peer in a process of its own, which ends with the context; call it with the number of a batch for one step."""

    def __init__(self, python: str, request: Request):
        """Build the peer; PeerError where it cannot be. `facts` has its peak memory, its FLOPs and its versions."""
        self.printed = TemporaryFile("w+", errors="replace")  # noqa: SIM115 (it is closed on leaving)
        self.name, (self.pipe, theirs) = request.name, Pipe()
        path = os.pathsep.join(map(str, (HERE.parent, HERE.parent / "kernels", *filter(None, [os.getenv("PYTHONPATH")]))))
        self.process = subprocess.Popen(
            [python, __file__, str(theirs.fileno())], env=os.environ | {"PYTHONPATH": path}, pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=self.printed, stderr=self.printed,
        )  # fmt: skip
        theirs.close()
        try:
            self.facts = self.ask(request)
        except PeerError:
            self.__exit__()
            raise

    def __call__(self, number: int) -> float:
        """Take one step; return its loss."""
        return self.take("step", number)

    def phases(self, number: int) -> dict[str, float]:
        return self.take("phases", number)

    def take(self, what: str, number: int) -> Any:
        try:
            return self.ask((what, number))
        except PeerError as error:  # among many that take turns, the name is needed
            raise PeerError(f"{self.name}: {error}") from error

    def ask(self, request: object) -> Any:
        try:
            self.pipe.send(request)
            if not self.pipe.poll(PATIENCE):
                raise PeerError(f"no answer in {PATIENCE} seconds")
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.printed.seek(0)
            said = [line.strip() for line in self.printed if line.strip()] or ["nothing"]
            raise PeerError(f"its process ended; it said last: {said[-1]}") from error
        if isinstance(answer, Failed):
            raise PeerError(answer.reason)
        return answer

    def __exit__(self, *error: object) -> None:
        """End the process: it leaves when its pipe is closed, and is killed where it does not."""
        self.pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.printed.close()


def serve(connection: Connection) -> None:
    """Build the peer of the first request and take steps until the other end of the pipe is closed."""
    import torch
    import torch._dynamo  # torch's optimizers load it when the first is made: it is no peer's memory
    from timing import built_at_peak, resident_bytes, synchronize

    try:
        request: Request = connection.recv()
        torch.set_num_threads(request.threads)
        torch.manual_seed(0)
        peer, device, count = importlib.import_module(request.module), torch.device(request.device), len(request.batches)
        run, peak = built_at_peak(lambda: peer.build(request), device, count)
        facts = {"version": importlib.metadata.version(request.package) if request.package else None, "peak_bytes": peak,
                 "process_bytes": resident_bytes("VmHWM"), "torch": torch.__version__}  # fmt: skip
        connection.send(facts | {"flops": [counted_flops(run, number) for number in range(count)]})
        while True:
            what, number = connection.recv()
            answer = run.phases(number) if what == "phases" else float(run(number))
            synchronize(device)  # the optimizer and the average may come after the loss
            connection.send(answer)
    except EOFError:
        return
    except Exception as error:  # whatever a library raises is the reason why it has no row
        connection.send(Failed(f"{type(error).__name__}: {error}".splitlines()[0]))


def counted_flops(run: Callable[[int], object], number: int) -> int:
    """Return the FLOPs of a step as torch counts them, attention by its products: the counter knows no fused one of a CPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(number)
    return counter.get_total_flops()


if __name__ == "__main__":
    import peer_process  # by its name: classes of __main__ would mean nothing to the process that unpickles them

    peer_process.serve(Connection(int(sys.argv[1])))
