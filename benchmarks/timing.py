"""One protocol for every benchmark: interleaved repeats, medians with p20 and p80, ratios paired within a round.

Machines drift and neighbours come and go; what is measured side by side in the same round suffers alike, so a ratio
is the median of the rounds' ratios, never a ratio of two medians taken apart.
"""

import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.errors import ConfigError

SQUARE = {"cpu": 2048, "cuda": 8192}  # side of the large square product
COPIED = {"cpu": 256 << 20, "cuda": 1 << 30}


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
    runs: Mapping[str, Callable[[int], object]], rounds: int, device: torch.device, warmup: int = 1, steps: int = 1
) -> dict[str, list[float]]:
    """Seconds a step of every run in every round.

    In a round each run takes `steps` steps in a row, called with their numbers, which go on from round to round; warm-up
    rounds have the first numbers too and are not kept. Every other round goes backwards, so that no run always follows
    the same neighbour.
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


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times as fast ours is: theirs / ours within each round, both in seconds."""
    return Spread.of([b / a for a, b in zip(ours, theirs, strict=True)])


class Clock:
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
        """Milliseconds a phase, summed over marks of the same name."""
        synchronize(self.device)
        taken = defaultdict(float)
        for (_, start), (name, end) in zip(self.marks, self.marks[1:], strict=False):
            taken[name] += start.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - start)
        return dict(taken)


class Ceiling:
    """The best matrix-product rate of a round, in FLOP/s, over shapes (rows, in, out); call it as a run of `interleave`.

    Of each shape the three products of a linear layer's training count (output, input gradient, weight gradient), so
    that no memory layout the networks use is left out.
    """

    def __init__(self, shapes: Iterable[tuple[int, int, int]], dtype: torch.dtype, device: torch.device, repeats: int = 3):
        self.device, self.repeats, self.rates = device, repeats, {}
        self.operands = [self._operands(shape, dtype) for shape in shapes]

    def _operands(self, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        rows, width_in, width_out = shape
        sizes = (rows, width_in), (width_out, width_in), (rows, width_out)
        return tuple(torch.randn(size, device=self.device).to(dtype) for size in sizes)

    @torch.inference_mode()
    def __call__(self, number: int) -> None:
        self.rates[number] = max(self._rate(*operands) for operands in self.operands)

    def _rate(self, x: Tensor, weight: Tensor, gradient: Tensor) -> float:
        flops = 2 * x.shape[0] * weight.numel()
        products = (lambda: F.linear(x, weight)), (lambda: gradient @ weight), (lambda: gradient.T @ x)
        return max(flops / self._seconds(product) for product in products)

    def _seconds(self, product: Callable[[], Tensor]) -> float:
        taken = []
        for _ in range(self.repeats):
            synchronize(self.device)
            start = time.perf_counter()
            product()
            synchronize(self.device)
            taken.append(time.perf_counter() - start)
        return min(taken)


def copy_rate(device: torch.device, repeats: int = 5) -> float:
    """Bytes a second, read and written, of copying COPIED bytes, which no cache holds; the best of the repeats."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target, taken = torch.empty_like(source), []
    for _ in range(1 + repeats):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return 2 * len(source) / min(taken[1:])


def square(device: torch.device) -> tuple[int, int, int]:
    return (SQUARE[device.type],) * 3


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a process of its own, which has allocated nothing yet; both must pickle.

    ConfigError when that process dies (a multiprocessing.Pool would wait for it for ever).
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool as error:
            raise ConfigError("a measuring process was killed, perhaps for want of memory; try a smaller --batch") from error


def peak_bytes(build: Callable[[], Callable[[int], object]], device: torch.device, rounds: int = 2) -> int:
    """Peak memory of building something and calling it with 0, 1, ...; run it in a fresh process.

    On a CPU the growth of the resident set (Linux), on CUDA the most that torch held at once.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = resident_bytes("VmRSS")
    run = build()
    for number in range(rounds):
        run(number)
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process.

    Not getrusage: its ru_maxrss starts at the size of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise ConfigError("peak memory on a CPU is read from /proc/self/status; run this on Linux") from error
    kilobytes = next(line.split()[1] for line in lines if line.startswith(field + ":"))
    return 1024 * int(kilobytes)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
