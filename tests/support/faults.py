"""Faults against real runs of two sharded ranks: how often each was tried, how often the run came back exactly, at what cost.

    python -m tests.support.faults [--times 10] [--seed 0] [--zero 1] [--json] [FAULT[=TIMES] ...]

One small run is broken again and again, and each time it goes on by `--resume auto` from what the last fault has left. It
has recovered when the sentence and exit code of the ranks that were left are the documented ones, every checkpoint verifies
and none that was complete is gone, and the next start goes on from the newest of them with the losses of a run that was
never interrupted, to the last bit. The ranks are forks of this process, so that torch is imported once.
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

from fastjepa import train
from fastjepa.checkpoint import shard_files
from fastjepa.checkpoint.directory import complete_checkpoints, step_of, verify_checkpoint
from fastjepa.cli.main import main as run_command
from fastjepa.errors import MACHINE_FAILED, CheckpointError
from fastjepa.loader.micro_batches import MicroBatches
from fastjepa.ranks.heartbeat import RANK_LOST

STEPS, EVERY, TIMEOUT = 60, 2, 8.0  # steps in all, steps between checkpoints, seconds without progress
NEARLY = STEPS - 14  # from this step on a run starts anew, so that the next fault still meets it
CONFIG = {
    "data": {"batch_size": 4, "crop_size": 32, "num_workers": 1},
    "mask": {"patch_size": 4, "min_keep": 4, "truncate_group": 4},
    "meta": {"model_name": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "pred_depth": 2, "pred_emb_dim": 24},
    "optimization": {"epochs": STEPS // 5, "warmup": 1, "ema": [0.9, 1.0]},
    "logging": {"every": 1, "monitor_every": 0, "probe_every": 0, "checkpoint_every": EVERY},
    "runtime": {"dtype": "fp32", "device": "cpu", "threads": 1, "timeout": TIMEOUT},
}

Break = Callable[[], None]  # is done to a rank before it trains


class StartEnd(NamedTuple):
    """The end of a start of the run, by rank."""

    codes: list[int]  # minus the signal that killed it
    said: list[str]  # standard output and error

    def sentences(self, rank: int) -> list[str]:
        return [line for line in self.said[rank].splitlines() if line.startswith("fastjepa train: ")]


class Outcome(NamedTuple):
    """The state of the run after one fault."""

    lost: int  # steps that had been taken and have to be taken again
    found: Path  # the newest complete checkpoint
    wrong: list[str]  # differences from what is documented; empty where the run recovered


class BrokenRun:
    """One run of two ranks in `output`, started again and again; its steps' losses must be those of `expected`."""

    def __init__(self, scratch: Path, output: Path, zero: int, expected: list[float] | None = None):
        self.scratch, self.output, self.zero, self.expected = scratch, output, zero, expected
        self.checkpoints, self.last = output / "checkpoints", None

    def start(self, breaks: Sequence[Break | None] = (None, None), until: int = STEPS) -> StartEnd:
        """Train from the newest checkpoint to step `until` on forked ranks, and check that they go on as they should."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs = [self.scratch / f"rank{rank}.log" for rank in range(len(breaks))]
        ranks = [self._fork(rank, len(breaks), port, logs[rank], what, until) for rank, what in enumerate(breaks)]
        ended = StartEnd(_wait(ranks), [log.read_text() for log in logs])
        if self.last:
            self.last.wrong.extend(self._went_on(ended))
        self.last = None
        return ended

    def _went_on(self, ended: StartEnd) -> list[str]:
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
            code = run_command(["train", "--config", str(self.scratch / "config.yaml"), "--output", str(self.output),
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
        """Return at least two complete checkpoints, trained for if need be; a run that is nearly over starts anew."""
        complete = self.complete()
        taken = step_of(complete[-1]) if complete else 0
        if taken > NEARLY:
            self.go_on(1)
            shutil.rmtree(self.checkpoints)
            complete, taken = [], 0
        said = self.start(until=taken + 2 * EVERY).said if len(complete) < 2 else []
        if len(self.complete()) < 2:
            raise SystemExit(f"two checkpoints to break could not be trained for: {said}")
        return self.complete()

    def go_on(self, steps: int) -> None:
        self.start(until=step_of(self.complete()[-1]) + steps)

    def left(self, before: list[Path], ended: StartEnd, told: dict[int, tuple[int, str]]) -> Outcome:
        """Return the outcome; `told` has the exit code and a part of the one sentence of each rank that tells of the fault."""
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
    """Return exit codes; a process that stands stopped when the others have ended is killed, as a launcher would."""
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


def signal_self(number: int) -> Break:
    return lambda: os.kill(os.getpid(), number)


LOSS, WRITES = [(train, "jepa_loss")], [(os, "fsync"), (os, "replace"), (shard_files, "save_file")]  # owners, their functions
TWO_SAVES = range(1, 1 + 2 * 14)  # calls; rank 1 has 8 a save, and makes up for it in later saves


def break_rank(
    run: BrokenRun, random: Random, places: list, action: Break, moments: range, own: tuple[int, str] | None = None
) -> Outcome:
    """Have one rank do `action` at one of the `moments`-th calls of `places`; the other rank must name it.

    `own` is the exit code of that rank and a part of its sentence, where it has one.
    """
    before, victim, after = run.settle(), random.randrange(2), random.random() < 0.5
    moment, breaks = random.choice(moments), [None, None]
    breaks[victim] = lambda: at_call(moment, places, action, after)
    told = {1 - victim: (RANK_LOST, f"rank {victim} (process ")} | ({victim: own} if own else {})
    return run.left(before, run.start(breaks), told)


def kill_mid_step(run: BrokenRun, random: Random) -> Outcome:
    """Kill a rank (kill -9) somewhere in one of its next steps."""
    return break_rank(run, random, LOSS, signal_self(signal.SIGKILL), range(1, 6))


def kill_in_save(run: BrokenRun, random: Random) -> Outcome:
    """Kill a rank (kill -9) at a write, fsync or rename of one of its next saves."""
    return break_rank(run, random, WRITES, signal_self(signal.SIGKILL), TWO_SAVES)


def stop_rank(run: BrokenRun, random: Random) -> Outcome:
    """Stop a rank (SIGSTOP): it does nothing any more, and does not even beat."""
    return break_rank(run, random, LOSS, signal_self(signal.SIGSTOP), range(1, 6))


def hang_data(run: BrokenRun, random: Random) -> Outcome:
    """Let the data of a rank not come, as from a file server that no longer answers: it says so itself."""
    own = (MACHINE_FAILED, f"the loader has delivered nothing for {TIMEOUT:g} s (runtime.timeout)")
    return break_rank(run, random, [(MicroBatches, "__getitem__")], lambda: time.sleep(30), range(4, 7), own)


def fill_disk(run: BrokenRun, random: Random) -> Outcome:
    """Fill the disk up during a save: every rank says so, in the same words."""
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


def truncate_shard(run: BrokenRun, random: Random) -> Outcome:
    """Cut the end off a shard: this is seen without reading it, and the run goes on from the checkpoint before."""
    shard = random.choice(sorted(run.settle()[-1].glob("*.safetensors")))
    os.truncate(shard, random.randrange(shard.stat().st_size))
    return run.outcome([] if run.complete()[-1] != shard.parent else [f"{shard} passes for complete"])


def flip_bit(run: BrokenRun, random: Random) -> Outcome:
    """Flip a bit of a shard: every rank refuses it and names it; without its checkpoint the run goes on."""
    shard = random.choice(sorted(run.settle()[-1].glob("*.safetensors")))
    data = bytearray(shard.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    shard.write_bytes(data)
    ended = run.start()
    shutil.rmtree(shard.parent)
    return run.left(run.complete(), ended, {rank: (2, f"{shard}: damaged") for rank in (0, 1)})


FAULTS = {"kill-mid-step": kill_mid_step, "kill-in-save": kill_in_save, "stopped": stop_rank, "data-hangs": hang_data,
          "disk-full": fill_disk, "truncated": truncate_shard, "flipped": flip_bit}  # fmt: skip


@contextlib.contextmanager
def small_disk(scratch: Path) -> Iterator[Path]:
    """Yield a directory on a tmpfs of its own, or `scratch` where this user may not mount one."""
    scratch.mkdir()
    mount = f"mount -t tmpfs -o size=16m tmpfs {scratch} && echo mounted && exec sleep 3600"
    holder = subprocess.Popen(["unshare", "-rm", "sh", "-c", mount], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        mounted = holder.stdout.readline() == b"mounted\n"
        yield Path(f"/proc/{holder.pid}/root{scratch}") if mounted else scratch
    finally:
        holder.kill()
        holder.communicate()


def try_fault(name: str, times: int, run_of: Callable[[Path], BrokenRun], scratch: Path, seed: int) -> dict[str, Any]:
    """Try one fault and return its row of the table."""
    began, random = time.monotonic(), Random(f"{seed} {name}")
    with small_disk(scratch / name) if name == "disk-full" else contextlib.nullcontext(scratch / name) as output:
        run = run_of(output)
        outcomes = [FAULTS[name](run, random) for _ in range(times)]
        run.go_on(EVERY)
        leftovers = [path.name for path in run.checkpoints.glob(".*")]
    wrong = [problem for outcome in outcomes for problem in outcome.wrong] + [f"left behind: {name}" for name in leftovers]
    lost, seconds = [outcome.lost for outcome in outcomes], time.monotonic() - began
    row = {"fault": name, "tried": times, "recovered": sum(not outcome.wrong for outcome in outcomes), "steps_lost": lost}
    disk = "tmpfs" if output.is_relative_to("/proc") else "file size limit"
    return row | {"seconds": seconds, "wrong": wrong} | ({"disk": disk} if name == "disk-full" else {})


def write_inputs(scratch: Path) -> None:
    """Write 40 images, which are five steps an epoch, and the config."""
    (scratch / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(40):
        pixels = generator.integers(0, 256, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(scratch / "images" / f"{number:02}.png")
    data = CONFIG["data"] | {"source": str(scratch / "images")}
    (scratch / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"data": data}))


def asked_times(words: Sequence[str], times: int) -> dict[str, int]:
    """Read `FAULT` and `FAULT=TIMES`; ValueError for a fault that there is not."""
    asked = {name: int(count or times) for name, _, count in (word.partition("=") for word in words or FAULTS)}
    if unknown := asked.keys() - FAULTS.keys():
        raise ValueError(f"no such fault: {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    return asked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT[=TIMES]", help=", ".join(FAULTS))
    parser.add_argument("--times", type=int, default=10, help="how often each is tried unless it says so (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="decides moments and ranks (default 0)")
    parser.add_argument("--zero", type=int, default=1, choices=(1, 2, 3), help="runtime.zero (default 1)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args()
    try:
        asked = asked_times(args.faults, args.times)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        write_inputs(scratch)
        whole = BrokenRun(scratch, scratch / "whole", args.zero)
        if any(whole.start().codes):
            raise SystemExit((scratch / "rank0.log").read_text())
        expected = [entry["loss"] for entry in whole.entries()]
        run_of = lambda output: BrokenRun(scratch, output, args.zero, expected)  # noqa: E731
        rows = [try_fault(name, times, run_of, scratch, args.seed) for name, times in asked.items()]
    print(json.dumps(rows) if args.json else "\n".join(map(str, rows)))
    for problem in [problem for row in rows for problem in row["wrong"]]:
        print(problem, file=sys.stderr)
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
