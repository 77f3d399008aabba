"""The timing protocol of every benchmark: interleaved rounds, medians with p20 and p80, ratios paired within a round.

A machine drifts, and neighbours come and go. What is measured side by side in one round suffers alike, so a ratio is the
median of the ratios of the rounds, never the ratio of two medians.
"""

import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F

from fastjepa.errors import UserError

SQUARE = {"cpu": 2048, "cuda": 8192}  # side of the large square product
COPIED = {"cpu": 256 << 20, "cuda": 1 << 30}  # bytes, more than any cache holds
WAIT_CYCLES = 2_000_000  # about a millisecond of a card, in which the host launches a whole call
REPEATS = 3  # of each product and copy, of which the fastest counts

Run = TypeVar("Run", bound=Callable[[int], object])


class Spread(NamedTuple):
    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
        return cls(statistics.median(values), p20, p80)


def interleave(
    runs: Mapping[Any, Callable[[int], object]], rounds: int, device: torch.device, warmup: int = 1, steps: int = 1
) -> dict[Any, list[float]]:
    """Return the seconds a step of every run in every round.

    In a round each run takes `steps` steps in a row. They are called with their numbers, which go on from round to round;
    the rounds to warm up have the first numbers too and are not kept. Every other round goes backwards, so that no run
    always follows the same neighbour.
    """
    seconds = {name: [] for name in runs}
    for number in [*range(warmup), *range(rounds)]:
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            synchronize(device)
            start = time.perf_counter()
            for step in range(number * steps, (number + 1) * steps):
                runs[name](step)
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / steps)
    return {name: taken[warmup:] for name, taken in seconds.items()}


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Say how many times as fast ours is: theirs / ours within each round, both in seconds."""
    return Spread.of([b / a for a, b in zip(ours, theirs, strict=True)])


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Time one call: by the clock on a CPU, by events on a card.

    The events are queued behind a short wait, so that a card never waits for the host unless the call needs longer than
    that wait to launch its kernels.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(WAIT_CYCLES)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


class PhaseClock:
    """Splits a step into phases: `mark(name)` ends the phase `name`; nothing waits for the device until `read`."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []
        self.mark("")

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((name, now))

    def read(self) -> dict[str, float]:
        """Return the milliseconds of each phase, summed over marks of the same name."""
        synchronize(self.device)
        taken = defaultdict(float)
        for (_, start), (name, end) in zip(self.marks, self.marks[1:], strict=False):
            taken[name] += start.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - start)
        return dict(taken)


class Ceiling:
    """The best rate of matrix products in a round, in FLOP/s; call it as a run of `interleave`.

    Each shape (rows, in, out) is a linear layer. All three products of its training are timed (output, gradient of the
    input, gradient of the weight), so that every memory layout of the networks is tried.
    """

    def __init__(self, shapes: Iterable[tuple[int, int, int]], dtype: torch.dtype, device: torch.device):
        self.device, self.rates = device, {}
        sizes = [((rows, k), (n, k), (rows, n)) for rows, k, n in shapes]
        self.operands = [[torch.randn(size, device=device).to(dtype) for size in three] for three in sizes]

    @torch.inference_mode()
    def __call__(self, number: int) -> None:
        self.rates[number] = max(2 * x.shape[0] * w.numel() / self._fastest(x, w, dy) for x, w, dy in self.operands)

    def _fastest(self, x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> float:
        products = (lambda: F.linear(x, w)), (lambda: dy @ w), (lambda: dy.T @ x)
        return min(seconds_of(product, self.device) for product in products for _ in range(REPEATS))


def copy_rate(device: torch.device) -> float:
    """Return the bytes a second, read and written, of copying more than any cache holds."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = [seconds_of(lambda: target.copy_(source), device) for _ in range(1 + REPEATS)]
    return 2 * len(source) / min(taken[1:])


def square_product(device: torch.device) -> tuple[int, int, int]:
    return (SQUARE[device.type],) * 3


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Return function(*args) of a new process, which has allocated nothing yet; both must pickle.

    UserError where that process dies (a multiprocessing.Pool would wait for it for ever).
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool as error:
            raise UserError("a measuring process was killed, perhaps for want of memory; try a smaller --batch") from error


def peak_bytes(build: Callable[[], Callable[[int], object]], device: torch.device, rounds: int = 2) -> int:
    """Return the peak memory of building a run and calling it with 0, 1, ...; do this in a fresh process."""
    return built_at_peak(build, device, rounds)[1]


def built_at_peak(build: Callable[[], Run], device: torch.device, rounds: int) -> tuple[Run, int]:
    """Build a run and call it with 0, 1, ...; return it, and the peak memory of both, in a process that has done nothing yet.

    On a CPU it is the growth of the resident set (Linux), on CUDA the most that torch held at once.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = resident_bytes("VmRSS")
    run = build()
    for number in range(rounds):
        run(number)
    synchronize(device)
    return run, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """Return VmRSS (now) or VmHWM (the most so far) of this process.

    The maximum of getrusage would not do: it starts at the size of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise UserError("peak memory on a CPU is read from /proc/self/status; run this on Linux") from error
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field + ":")))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
