"""Stopping a run by a signal, after the same step on all ranks."""

import signal
import time

from fastjepa.ranks.collectives import max_over_ranks


class Stop:
    """A stop after the current step, asked for by SIGTERM or SIGINT; a second Ctrl-C ends the process at once.

    A launcher passes on what the terminal or SLURM has sent to every process: only a SIGINT that comes PASSED_ON seconds
    after the first is another one, and SIGTERM has SIGKILL to follow it.
    """

    PASSED_ON = 3.0

    def __enter__(self) -> "Stop":
        self.received = self._asked = None
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        now = time.monotonic()
        self.received, self._asked = self.received or number, self._asked or now
        if number == signal.SIGINT and now - self._asked > self.PASSED_ON:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)

    def agreed(self) -> bool:
        """Return whether any rank was asked, so that all stop after the same step."""
        self.received = max_over_ranks(self.received or 0) or None
        return self.received is not None
