"""Stopping a run by a signal: after the same step on all ranks, or at once where it waits for data."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from fastjepa.errors import MACHINE_FAILED
from fastjepa.loader.workers import seconds_waited
from fastjepa.ranks.collectives import max_over_ranks
from fastjepa.ranks.heartbeat import end_process

SIGNALS = (signal.SIGTERM, signal.SIGINT)
END = b"\0"  # no signal's number: tells the thread that there is nothing more to hear


class Stop(AbstractContextManager):
    """A stop after the current step, asked for by SIGTERM or SIGINT.

    A thread hears the signals as well, whatever the main thread waits in. It ends the process where no micro-batch has come
    for WAIT seconds since a signal, at a second signal, and where the main thread itself has been reading one for `timeout`
    seconds. `where()` is the end of each sentence: which checkpoint is the last good one.

    A launcher passes on what the terminal or SLURM has sent to every process: there, a signal counts as a second one when it
    comes PASSED_ON seconds after the first.
    """

    WAIT, PASSED_ON, APART = 3.5, 3.0, 1.0  # seconds

    def __init__(self, timeout: float, where: Callable[[], str]):
        self.received: int | None = None
        self._timeout, self._where, self._asked = timeout, where, 0.0
        self._apart = self.PASSED_ON if "LOCAL_RANK" in os.environ else self.APART

    def __enter__(self) -> "Stop":
        self._ear, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._mouth_before = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)  # written to at once, by C
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self._mouth_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._mouth, END)
        self._thread.join()
        os.close(self._mouth)
        os.close(self._ear)

    def agreed(self) -> bool:
        """Return whether any rank was asked, so that all stop after the same step; a signal that comes meanwhile counts at the
        next one.
        """
        asked = max_over_ranks(self.received or 0)
        self.received = asked or self.received
        return asked > 0

    def _note(self, number: int, frame: object) -> None:
        self.received = self.received or number

    def _listen(self) -> None:
        """Hear signals until the end, and look at the main thread in between."""
        asked_by, numbers = None, b""
        while END not in numbers:
            heard = select.select([self._ear], [], [], 0.1 if asked_by else 1.0)[0]
            numbers = os.read(self._ear, 4096) if heard else b""
            for number in (number for number in numbers if number in SIGNALS):  # others have handlers too
                asked_by = self._hear(number, asked_by)
            self._look(asked_by)

    def _hear(self, number: int, asked_by: int | None) -> int:
        """Take a signal; end the process when it is the second. Return the first."""
        if asked_by is None:
            self._asked = time.monotonic()
        elif time.monotonic() - self._asked > self._apart:
            self._end(128 + number, f"ended at once by a second signal, {signal.Signals(number).name}")
        return asked_by or number

    def _look(self, asked_by: int | None) -> None:
        """End the process where the main thread has waited for data for too long."""
        waited = seconds_waited()
        if asked_by and min(waited, time.monotonic() - self._asked) > self.WAIT:
            self._end(128 + asked_by, f"stopped by {signal.Signals(asked_by).name} while it waited for data, and not saved")
        if waited > self._timeout + 2.0:  # the loader's processes are given up after `timeout`, by the main thread
            said = f"no micro-batch could be read in {self._timeout:g} s (runtime.timeout); look at the storage of the data"
            self._end(MACHINE_FAILED, said)

    def _end(self, code: int, reason: str) -> None:
        end_process(f"{reason}; {self._where()}", code)
