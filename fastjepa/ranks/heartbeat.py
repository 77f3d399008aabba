"""Heartbeats of the ranks: where one has stopped and the others would wait for ever, all say its name, and end.

Each rank publishes how far it has come to the launcher's store, over a connection of its own and from a thread of its
own: no collective, no device. Ranks run the same program, so whoever has come the least far is who the others wait for.

Example: with a runtime.timeout of 600 s on 4 ranks, every rank publishes a sign a second. Rank 2 hangs while it reads data,
at progress 812, and the others wait for it in a reduction at progress 815. After 600 s every one finds that 812 is the
least, that this sign has not changed for 600 s while the process still beats, and ends with "rank 2 ... has stood still".
"""

import json
import multiprocessing
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from fastjepa.ranks.collectives import barrier, reductions_begun, text_of_main
from fastjepa.ranks.world import World

RANK_LOST = 75  # exit code, EX_TEMPFAIL of sysexits.h: nothing to mend here, start the same command again
MISSED_BEATS = 3  # beats that a living process never misses
RUN_AGAIN = "start the same command again to go on from the last checkpoint"


class LifeSign(NamedTuple):
    """The sign that a rank publishes about itself."""

    beat: int  # grows while the process lives
    progress: int  # grows with the main thread's work
    step: int  # finished
    doing: str
    name: str
    failed: str = ""  # the error that ended it


class SeenSign(NamedTuple):
    """The latest sign of a rank, and since when (this process's monotonic clock, seconds) parts of it have not changed."""

    sign: LifeSign
    alive: float
    moved: float


class Heartbeat(AbstractContextManager):
    """A watch over the ranks of a run, inside a `with` block; on one rank it does nothing and starts no thread.

    A rank that has not gone on for `timeout` seconds, whose process died, or that left the block with an error ends every
    other rank with one sentence that names it and exit code RANK_LOST. Work that takes long calls `moves` in between.
    """

    def __init__(self, world: World, timeout: float, step: int = 0):
        self.rank, self.size, self.timeout = world.rank, world.size, timeout
        self.interval = min(1.0, timeout / 8) * max(1.0, world.size / 64)  # seconds; one store answers every rank
        self.step, self.doing, self.failed, self._moves, self._beat = step, "between two steps", "", 0, 0
        self._seen: dict[int, SeenSign] = {}
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._talk, self._watch)]

    def batches(self, batches: Iterable) -> Iterator:
        """Yield the same micro-batches; whether this rank waits for one or computes is known to the others."""
        batches = iter(batches)
        while True:
            self.moves("waiting for its next micro-batch")
            try:
                batch = next(batches)
            except StopIteration:
                self.moves("finishing a step")
                return
            self.moves("computing")
            yield batch

    def finished(self, step: int) -> None:
        """Note that a step is done."""
        self.step = step
        self.moves("between two steps")

    def moves(self, doing: str | None = None) -> None:
        """Note that this rank goes on, and what it is doing."""
        self.doing = doing or self.doing
        self._moves += 1

    def __enter__(self) -> "Heartbeat":
        if self.size > 1:
            prefix = text_of_main(uuid.uuid4().hex)  # a restarted run finds the old one's keys in the store
            self._keys = [f"{prefix}/{rank}" for rank in range(self.size)]
            self._connection = _connect(self.timeout)
            self._publish()
            barrier()
            self._read()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self.size == 1:
            return
        # What a collective raises says that a peer is gone and not which; our own errors have classes of their own.
        raised = type(error) is RuntimeError or isinstance(error, dist.DistError)
        if raised and (gone := self._who_left()):
            end_process(f"{gone} [{one_line(error)[:120]}]")
        self.failed = one_line(error) if error else ""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * self.interval)

    def _who_left(self) -> str | None:
        """Return a sentence on the rank that died or failed, once it is known; None if all live: the error is this rank's."""
        until = time.monotonic() + (MISSED_BEATS + 2) * self.interval
        while time.monotonic() < until:
            for rank, (sign, alive, _) in self._others():
                if sign.failed:
                    return rank_failed(rank, sign)
                if time.monotonic() - alive > MISSED_BEATS * self.interval and self._store_answers():
                    return rank_died(rank, sign)
            time.sleep(self.interval / 10)
        return None if self._store_answers() else self._store_lost()

    def _others(self) -> list[tuple[int, SeenSign]]:
        return [(rank, seen) for rank, seen in sorted(self._seen.copy().items()) if rank != self.rank]

    def _store_answers(self) -> bool:
        return time.monotonic() - self._answered < (MISSED_BEATS - 1) * self.interval

    def _store_lost(self) -> str:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return f"the launcher that keeps the ranks together at {where} no longer answers; look there and {RUN_AGAIN}"
        if 0 in self._seen and self.rank != 0:
            return rank_died(0, self._seen[0].sign)
        return f"the store of rank 0 at {where} no longer answers; look there and {RUN_AGAIN}"

    def _sign(self) -> LifeSign:
        name = f"process {os.getpid()} on {socket.gethostname()}"
        return LifeSign(self._beat, self._moves + reductions_begun(), self.step, self.doing, name, self.failed)

    def _publish(self) -> None:
        self._beat += 1
        self._connection.set(self._keys[self.rank], json.dumps(self._sign()))

    def _read(self) -> None:
        for rank, text in enumerate(self._connection.multi_get(self._keys)):
            self._note(rank, LifeSign(*json.loads(text)))
        self._answered = time.monotonic()

    def _talk(self) -> None:
        """Publish and read, over and over; may block for as long as the store does."""
        while True:
            leaving = self._stop.wait(self.interval)
            try:
                self._publish()
                if leaving:
                    return
                self._read()
            except RuntimeError:  # a broken connection stays broken; the age of the last answer will tell
                return

    def _note(self, rank: int, sign: LifeSign) -> None:
        """Note a rank's sign, and when its beat and its progress last changed."""
        now, before = time.monotonic(), self._seen.get(rank)
        alive = before.alive if before and before.sign.beat == sign.beat else now
        moved = before.moved if before and before.sign.progress == sign.progress else now
        self._seen[rank] = SeenSign(sign, alive, moved)

    def _watch(self) -> None:
        """End the process when a rank holds up the others, even while this one's main thread waits in a collective."""
        while not self._stop.wait(self.interval):
            self._note(self.rank, self._sign())
            if reason := self._verdict(time.monotonic()):
                end_process(reason)

    def _verdict(self, now: float) -> str | None:
        """Return why this process has to end, None while all is well."""
        if now - self._answered > self.timeout:
            return self._store_lost()
        for rank, (sign, alive, _) in self._others():
            # By then an error that all ranks have in common has been raised here too.
            if sign.failed and now - alive > MISSED_BEATS * self.interval:
                return rank_failed(rank, sign)
        least = min(seen.sign.progress for seen in self._seen.copy().values())
        last = [(rank, seen) for rank, seen in sorted(self._seen.copy().items()) if seen.sign.progress == least]
        rank, (sign, alive, moved) = last[0]
        # Later by as much as a rank needs to say itself why it stands still: its loader gives up after `timeout`.
        if len(self._seen) < self.size or now - moved <= self.timeout + MISSED_BEATS * self.interval:
            return None
        if sign.failed:
            return rank_failed(rank, sign)
        if now - alive > MISSED_BEATS * self.interval:
            return rank_died(rank, sign, self.timeout)
        if len(last) == self.size:
            return (
                f"all {self.size} ranks have stood still for {self.timeout:g} s (runtime.timeout) after step {sign.step}, "
                f"{sign.doing}: look at the network and the devices (NCCL_DEBUG=INFO) and {RUN_AGAIN}"
            )
        return (
            f"rank {rank} ({sign.name}) has stood still for {self.timeout:g} s after step {sign.step}, {sign.doing}; look at "
            f"what it waits for, raise runtime.timeout if it was only slow, and {RUN_AGAIN}"
        )


def one_line(error: BaseException) -> str:
    """Return an error's class and message in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def rank_failed(rank: int, sign: LifeSign) -> str:
    """Return the sentence for a rank that ended with an error."""
    return f"rank {rank} ({sign.name}) ended after step {sign.step} with {sign.failed}; mend that and {RUN_AGAIN}"


def rank_died(rank: int, sign: LifeSign, seconds: float | None = None) -> str:
    """Return the sentence for a rank that no longer beats, for so many seconds where that is known."""
    since = f" for {seconds:g} s (runtime.timeout)" if seconds else ""
    return (
        f"rank {rank} ({sign.name}) has given no sign of life{since} after step {sign.step}; see what killed or stopped it "
        f"there (dmesg, for lack of memory) and {RUN_AGAIN}"
    )


def end_process(reason: str, code: int = RANK_LOST) -> None:
    """Say why, and end this process and its children at once, without any clean-up, which would wait for those who are gone."""
    sys.stderr.write(f"fastjepa train: {reason}\n")  # in one piece: other ranks speak at the same moment
    sys.stderr.flush()
    sys.stdout.flush()
    for child in multiprocessing.active_children():
        child.kill()  # it would look for its parent every few seconds, or wait for data
    os._exit(code)


def _connect(timeout: float) -> dist.TCPStore:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout))
