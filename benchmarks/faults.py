"""Faults against real runs of two sharded ranks: what was tried, how often the run came back exactly, and at what cost.

    python benchmarks/faults.py [--times 10] [--seed 0] [--zero 1] [--json] [FAULT[=TIMES] ...]

One small run is broken again and again, each time going on by `--resume auto` from what the last fault has left. It counts
as recovered when the sentence and exit code of the ranks that were left are as documented, every checkpoint there verifies
and none that was complete before is gone, and when the next start goes on from the newest of them with the losses of a run
that was never interrupted, to the last bit. The ranks are processes that this one forks, so that torch is imported once.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # before torch is imported

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 (here, so that no rank spends seconds on what it imports)
import numpy as np
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from fastjepa import train
from fastjepa.checkpoint import shard_files
from fastjepa.checkpoint.directory import complete_checkpoints, step_of, verify_checkpoint
from fastjepa.cli import main as main_module
from fastjepa.errors import CheckpointError
from fastjepa.loader.micro_batches import MicroBatches
from fastjepa.ranks.heartbeat import RANK_LOST

STEPS, EVERY, TIMEOUT = 60, 2, 4.0  # steps in all, steps between checkpoints, seconds without progress
NEARLY = STEPS - 14  # from where on a run starts anew, so that the next fault still meets it
CONFIG = {
    "data": {"batch_size": 4, "crop_size": 32, "num_workers": 1},
    "mask": {"patch_size": 4, "min_keep": 4, "truncate_group": 4},
    "meta": {"model_name": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "pred_depth": 2, "pred_emb_dim": 24},
    "optimization": {"epochs": STEPS // 5, "warmup": 1, "ema": [0.9, 1.0]},
    "logging": {"every": 1, "monitor_every": 0, "probe_every": 0, "checkpoint_every": EVERY},
    "runtime": {"dtype": "fp32", "device": "cpu", "threads": 1, "timeout": TIMEOUT},
}

Break = Callable[[], None]  # what a rank does to itself before it trains


class Ended(NamedTuple):
    """How a start of the run ended, by rank."""

    codes: list[int]  # minus the signal that killed it
    said: list[str]  # standard output and error

    def sentences(self, rank: int) -> list[str]:
        return [line for line in self.said[rank].splitlines() if line.startswith("fastjepa train: ")]


class Outcome(NamedTuple):
    """What one fault has left."""

    lost: int  # steps that had been taken and have to be taken again
    found: Path  # the newest complete checkpoint
    wrong: list[str]  # what was not as documented; empty where the run recovered


class Run:
    """One run of two ranks in `output`, started again and again; its steps' losses must be those of `expected`."""

    def __init__(self, scratch: Path, output: Path, zero: int, expected: list[float] | None = None):
        self.scratch, self.output, self.zero, self.expected = scratch, output, zero, expected
        self.checkpoints, self.last = output / "checkpoints", None

    def start(self, breaks: Sequence[Break | None] = (None, None), until: int = STEPS) -> Ended:
        """Train from the newest checkpoint to step `until` on forked processes, and see that it goes on as it should."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs = [self.scratch / f"rank{rank}.log" for rank in range(len(breaks))]
        ranks = [self._fork(rank, len(breaks), port, logs[rank], what, until) for rank, what in enumerate(breaks)]
        ended = Ended(_wait(ranks), [log.read_text() for log in logs])
        if self.last:
            self.last.wrong.extend(self._went_on(ended))
        self.last = None
        return ended

    def _went_on(self, ended: Ended) -> list[str]:
        losses = [entry["loss"] for entry in self.entries()]
        wrong = [] if f"resuming from {self.last.found}\n" in ended.said[0] else [f"not from {self.last.found}: {ended.said}"]
        differ = [step for step, pair in enumerate(zip(losses, self.expected, strict=False), 1) if len(set(pair)) > 1]
        return wrong + [f"the loss of step {step} differs" for step in differ[:1]]

    def _fork(self, rank: int, world: int, port: int, log: Path, what: Break | None, until: int) -> int:
        log.write_text("")
        if (process := os.fork()) != 0:
            return process
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()}
        code = 1
        try:
            if what:
                what()
            code = main_module.main(["train", "--config", str(self.scratch / "config.yaml"), "--output", str(self.output),
                             "--max-steps", str(until), f"runtime.zero={self.zero}"])  # fmt: skip
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def entries(self) -> list[dict[str, Any]]:
        file = self.output / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def complete(self) -> list[Path]:
        return complete_checkpoints(self.checkpoints)

    def settle(self) -> list[Path]:
        """Two complete checkpoints to break, trained for where they are not there; a run that is nearly over starts anew."""
        complete = self.complete()
        taken = step_of(complete[-1]) if complete else 0
        if taken > NEARLY:
            self.go_on(1)
            shutil.rmtree(self.checkpoints)
            complete, taken = [], 0
        if len(complete) < 2:
            self.start(until=taken + 2 * EVERY)
        return self.complete()

    def go_on(self, steps: int) -> None:
        self.start(until=step_of(self.complete()[-1]) + steps)

    def left(self, before: list[Path], ended: Ended, told: dict[int, tuple[int, str]]) -> Outcome:
        """What a fault has left; `told` gives the exit code and a part of the one sentence of each rank that tells of it."""
        wrong = []
        for rank, (code, part) in told.items():
            said = ended.sentences(rank)
            if ended.codes[rank] != code or len(said) != 1 or part not in said[0]:
                wrong.append(f"rank {rank}: exit code {ended.codes[rank]}, {said or ended.said[rank][-2000:]}")
        complete = self.complete()
        if not complete or complete[-1].name < before[-1].name:
            wrong.append(f"{before[-1].name} is gone")
        for path in complete:
            try:
                verify_checkpoint(path)
            except CheckpointError as error:
                wrong.append(str(error))
        return self.outcome(wrong)

    def outcome(self, wrong: list[str]) -> Outcome:
        found = self.complete()[-1]
        taken = max(entry["step"] for entry in self.entries())
        self.last = Outcome(taken - step_of(found), found, wrong)
        return self.last


def _wait(processes: list[int], limit: float = 120.0) -> list[int]:
    """Exit codes. What stands stopped when the others have ended is killed, as a launcher would."""
    codes: dict[int, int] = {}
    end = time.monotonic() + limit
    while len(codes) < len(processes):
        waiting = [process for process in processes if process not in codes]
        for process in waiting:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[process] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end or codes and len(waiting) == 1 and _stopped(process):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[process] for process in processes]


def _stopped(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def at_call(moment: int, places: Sequence[tuple[Any, str]], action: Callable[[], None], after: bool = False) -> None:
    """Have the `moment`-th call of these functions, counted together, do `action` before or after its own work."""
    calls = iter(range(1, sys.maxsize))

    def hook(real: Callable) -> Callable:
        def hooked(*args: Any, **kwargs: Any) -> Any:
            now = next(calls) == moment
            if now and not after:
                action()
            result = real(*args, **kwargs)
            if now and after:
                action()
            return result

        return hooked

    for owner, name in places:
        setattr(owner, name, hook(getattr(owner, name)))


def only(victim: int, what: Break) -> list[Break | None]:
    return [what if rank == victim else None for rank in range(2)]


def signal_self(number: int) -> Break:
    return lambda: os.kill(os.getpid(), number)


def kill_mid_step(run: Run, random: Random) -> Outcome:
    """kill -9 of a rank somewhere in one of its next steps."""
    before, victim, moment, after = run.settle(), random.randrange(2), random.randint(1, 5), random.random() < 0.5
    what = lambda: at_call(moment, [(train, "jepa_loss")], signal_self(signal.SIGKILL), after)  # noqa: E731
    return run.left(before, run.start(only(victim, what)), {1 - victim: (RANK_LOST, f"rank {victim} (process ")})


WRITES = [(os, "fsync"), (os, "replace"), (shard_files, "save_file")]


def kill_in_save(run: Run, random: Random) -> Outcome:
    """kill -9 of a rank at a write, fsync or rename of one of its next two saves."""
    before, victim, after = run.settle(), random.randrange(2), random.random() < 0.5
    moment = random.randint(1, 2 * (8, 14)[victim == 0])  # how many there are
    what = lambda: at_call(moment, WRITES, signal_self(signal.SIGKILL), after)  # noqa: E731
    return run.left(before, run.start(only(victim, what)), {1 - victim: (RANK_LOST, f"rank {victim} (process ")})


def stopped(run: Run, random: Random) -> Outcome:
    """A rank that does nothing any more (SIGSTOP), not even beat."""
    before, victim, moment = run.settle(), random.randrange(2), random.randint(1, 5)
    what = lambda: at_call(moment, [(train, "jepa_loss")], signal_self(signal.SIGSTOP))  # noqa: E731
    return run.left(before, run.start(only(victim, what)), {1 - victim: (RANK_LOST, f"rank {victim} (process ")})


def data_hangs(run: Run, random: Random) -> Outcome:
    """A rank whose data do not come, as from a file server that no longer answers: both ranks name it."""
    before, victim, moment = run.settle(), random.randrange(2), random.randint(4, 6)
    what = lambda: at_call(moment, [(MicroBatches, "__getitem__")], lambda: time.sleep(30))  # noqa: E731
    named = RANK_LOST, f"rank {victim} (process "
    return run.left(before, run.start(only(victim, what)), {0: named, 1: named})


def disk_full(run: Run, random: Random) -> Outcome:
    """A disk that fills up during a save: every rank says so, in the same words."""
    before = run.settle()
    size = sum(file.stat().st_size for file in before[-1].iterdir())
    room = random.randint(1 << 15, size * 3 // 4)
    sentence = 2, "could not be written ("
    if run.output.is_relative_to("/proc"):
        filler = run.output / "filler"
        free = shutil.disk_usage(run.output).free
        filler.write_bytes(bytes(free - room))
        ended = run.start()
        filler.unlink()
    else:
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room // 8, room // 8))  # noqa: E731
        ended = run.start([limit, limit])
    outcome = run.left(before, ended, {0: sentence, 1: sentence})
    if len({tuple(ended.sentences(rank)) for rank in (0, 1)}) > 1:
        outcome.wrong.append(f"not the same sentence: {ended.said}")
    return outcome


def truncated(run: Run, random: Random) -> Outcome:
    """A shard that has lost its end is seen without being read: the run goes on from the checkpoint before."""
    shard = random.choice(sorted(run.settle()[-1].glob("*.safetensors")))
    os.truncate(shard, random.randrange(shard.stat().st_size))
    return run.outcome([] if run.complete()[-1] != shard.parent else [f"{shard} passes for complete"])


def flipped(run: Run, random: Random) -> Outcome:
    """A shard with one wrong bit is refused by every rank and named; without its checkpoint the run goes on."""
    shard = random.choice(sorted(run.settle()[-1].glob("*.safetensors")))
    data = bytearray(shard.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    shard.write_bytes(data)
    ended = run.start()
    shutil.rmtree(shard.parent)
    return run.left(run.complete(), ended, {rank: (2, f"{shard}: damaged") for rank in (0, 1)})


FAULTS = {"kill-mid-step": kill_mid_step, "kill-in-save": kill_in_save, "stopped": stopped, "data-hangs": data_hangs,
          "disk-full": disk_full, "truncated": truncated, "flipped": flipped}  # fmt: skip


@contextlib.contextmanager
def small_disk(scratch: Path) -> Iterator[Path]:
    """A directory on a tmpfs of its own, or on `scratch` where this user may not mount one."""
    scratch.mkdir()
    mount = f"mount -t tmpfs -o size=16m tmpfs {scratch} && echo mounted && exec sleep 3600"
    holder = subprocess.Popen(["unshare", "-rm", "sh", "-c", mount], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        mounted = holder.stdout.readline() == b"mounted\n"
        yield Path(f"/proc/{holder.pid}/root{scratch}") if mounted else scratch
    finally:
        holder.kill()
        holder.communicate()


def measure(name: str, scratch: Path, zero: int, times: int, seed: int, expected: list[float]) -> dict[str, Any]:
    """A row of the table."""
    began, random, outcomes = time.monotonic(), Random(f"{seed} {name}"), []
    disk = small_disk(scratch / name) if name == "disk-full" else contextlib.nullcontext(scratch / name)
    with disk as output:
        run = Run(scratch, output, zero, expected)
        for _ in range(times):
            outcomes.append(FAULTS[name](run, random))
        run.go_on(EVERY)
        leftovers = [path.name for path in run.checkpoints.glob(".*")]
        way = {"disk": "tmpfs" if output.is_relative_to("/proc") else "file size limit"} if name == "disk-full" else {}
    wrong = [problem for outcome in outcomes for problem in outcome.wrong] + [f"left behind: {name}" for name in leftovers]
    row = {"fault": name, "tried": times, "recovered": sum(not outcome.wrong for outcome in outcomes)}
    row |= {"steps_lost": [outcome.lost for outcome in outcomes], "seconds": time.monotonic() - began, "wrong": wrong}
    return row | way


def prepare(scratch: Path) -> None:
    """40 images and the config: five steps an epoch."""
    (scratch / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(40):
        pixels = generator.integers(0, 256, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(scratch / "images" / f"{number:02}.png")
    data = CONFIG["data"] | {"source": str(scratch / "images")}
    (scratch / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"data": data}))


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("fault", "tried", "recovered", "steps lost, mean", "most", "s each", box=None)
    for row in rows:
        lost = row["steps_lost"]
        shown.add_row(row["fault"], str(row["tried"]), str(row["recovered"]), f"{sum(lost) / len(lost):.1f}", str(max(lost)),
                      f"{row['seconds'] / row['tried']:.1f}")  # fmt: skip
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT[=TIMES]", help=", ".join(FAULTS))
    parser.add_argument("--times", type=int, default=10, help="how often each is tried unless it says so (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and ranks (default 0)")
    parser.add_argument("--zero", type=int, default=1, choices=(1, 2, 3), help="runtime.zero (default 1)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args()
    asked = {name: int(times or args.times) for name, _, times in (word.partition("=") for word in args.faults or FAULTS)}
    if unknown := asked.keys() - FAULTS.keys():
        parser.error(f"no such fault: {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        prepare(scratch)
        whole = Run(scratch, scratch / "whole", args.zero)
        if any(whole.start().codes):
            raise SystemExit((scratch / "rank0.log").read_text())
        expected = [entry["loss"] for entry in whole.entries()]
        rows = [measure(name, scratch, args.zero, times, args.seed, expected) for name, times in asked.items()]
    print(json.dumps(rows)) if args.json else Console().print(table(rows))
    for problem in [problem for row in rows for problem in row["wrong"]]:
        print(problem, file=sys.stderr)
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
