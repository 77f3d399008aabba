"""How an op is timed: each provider in turn, on inputs that no cache holds, beside what the machine can do at best.

On a card a round is timed by events around the call, queued behind a short wait, so that the card never waits for the host
unless the call launches for longer than that; on a CPU by the clock. Inputs are rotated through enough copies to pass twice
the last cache. Bytes and FLOPs are the least the op needs, the same for every provider: a rate says how long it took.
"""

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DIRECTIONS = ("forward", "forward+backward")
ROUNDS = {"cuda": (50, 5), "cpu": (15, 2), "toy": (3, 1)}  # timed, to warm up
WAIT_CYCLES = 2_000_000  # about a millisecond: what a call may need to launch everything
SQUARE = {"cuda": 8192, "cpu": 1024, "toy": 128}  # side of the product whose rate is the ceiling
MOST_COPIES = 64


class Load(NamedTuple):
    """One set of inputs and what the op has to do with it."""

    args: tuple
    leaves: Sequence[Tensor] = ()  # get gradients
    forward: int = 0  # bytes read and written
    backward: int = 0
    flops: int = 0  # forward; the backward counts 2.5 times that for attention, which recomputes the scores
    size: int = 0  # bytes of one set, where they are not those of args


class Provider(NamedTuple):
    call: Callable[..., Any]
    prepare: Callable[[tuple], tuple] = lambda args: args  # once for each copy of the inputs
    absent: str = ""  # why it cannot run here
    compiles: bool = False
    whole: bool = True  # in one graph
    cuda_only: bool = False


def compiled(call: Callable[..., Any]) -> Provider:
    return Provider(call, compiles=True)


def missing(module: str) -> str:
    return "" if importlib.util.find_spec(module) else f"{module} is not installed"


def nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


class Clock:
    """The timer pytest-benchmark reads: it stands still but for the calls that `run` times."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, call: Callable[[], Any], device: torch.device) -> float:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(WAIT_CYCLES)
            start.record()
            call()
            end.record()
            end.synchronize()
            taken = start.elapsed_time(end) / 1000
        else:
            begun = time.perf_counter()
            call()
            taken = time.perf_counter() - begun
        self.now += taken
        return taken


class Setting:
    """Where a run measures, and its ceilings, measured once in the same process."""

    def __init__(self, device: torch.device, toy: bool):
        self.device, self.toy, self.clock = device, toy, Clock()
        self.scale = "toy" if toy else device.type
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.generator = torch.Generator(device).manual_seed(0)

    def pick(self, **by_scale: Any) -> Any:
        return by_scale[self.scale]

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def some(self, total: int, count: int) -> Tensor:
        """(count,) int32: distinct rows among `total`, rising, as masks name them."""
        chosen = torch.randperm(total, generator=self.generator, device=self.device)[:count]
        return chosen.sort().values.int()

    @functools.cached_property
    def cache_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).L2_cache_size
        levels = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        return max((int(level.read_text().strip().removesuffix("K")) * 1024 for level in levels), default=32 << 20)

    def copies(self, size: int) -> int:
        return 2 if self.toy else min(MOST_COPIES, -(-2 * self.cache_bytes // max(size, 1)))

    @functools.cached_property
    def copy_rate(self) -> float:
        """Bytes a second, read and written, of copying what no cache holds."""
        source = torch.ones(1 << 18 if self.toy else max(2 * self.cache_bytes, 256 << 20) // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * nbytes(source) / self._median(lambda: target.copy_(source))

    @functools.cached_property
    def gemm_rate(self) -> float:
        side = SQUARE[self.scale]
        a, b = self.randn(side, side), self.randn(side, side)
        return 2 * side**3 / self._median(lambda: a @ b)

    def _median(self, call: Callable[[], Any]) -> float:
        rounds, warmup = ROUNDS[self.scale]
        return statistics.median([self.clock.run(call, self.device) for _ in range(warmup + rounds)][warmup:])


def measure(
    benchmark, setting: Setting, provider: Provider | Callable, make: Callable[[Setting], Load], direction: str
) -> None:
    """Times one provider; everything but pytest-benchmark's own statistics goes into extra_info."""
    provider = provider if isinstance(provider, Provider) else Provider(provider)
    benchmark.extra_info.update(direction=direction, device=str(setting.device), toy=setting.toy)
    first = make(setting)
    absent = provider.absent
    if provider.cuda_only and setting.device.type != "cuda":
        absent = "it runs on CUDA alone"
    if absent:
        benchmark.extra_info["not_measured"] = absent
        benchmark.pedantic(lambda: None)
        return
    size = first.size or nbytes(*(arg for arg in first.args if isinstance(arg, Tensor)))
    loads = [first, *(make(setting) for _ in range(setting.copies(size) - 1))]
    call = provider.call
    if provider.compiles:  # toy runs look at the tracing alone: lowering it takes a compiler half a minute
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=provider.whole, dynamic=False, backend="aot_eager" if setting.toy else "inductor")
    steps = [_step(call, provider.prepare(load.args), load.leaves, direction) for load in loads]
    rounds, warmup = ROUNDS[setting.scale]
    for number in range(warmup):
        steps[number % len(steps)]()
    benchmark.extra_info["peak_bytes"] = _peak(steps[0], setting.device)
    turn = iter(range(rounds))
    seconds = []
    benchmark.pedantic(
        lambda step: seconds.append(setting.clock.run(step, setting.device)),
        setup=lambda: ((steps[next(turn) % len(steps)],), {}),
        rounds=rounds,
    )
    benchmark.extra_info |= _rates(setting, first, direction, seconds) | {"copies": len(loads)}


def _step(call: Callable, args: tuple, leaves: Sequence[Tensor], direction: str) -> Callable[[], Any]:
    if direction == "forward":

        def forward():
            with torch.no_grad():
                call(*args)

        return forward
    for leaf in leaves:
        leaf.requires_grad_()
    dout = torch.ones_like(call(*args))

    def both():
        torch.autograd.grad(call(*args), leaves, dout)

    return both


def _peak(step: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call takes beyond its inputs; a CPU does not say."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _rates(setting: Setting, load: Load, direction: str, seconds: list[float]) -> dict[str, float]:
    both = direction != "forward"
    spread = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds * 4
    median = statistics.median(seconds)
    rates = {"median_s": median, "p20_s": spread[0], "p80_s": spread[-1], "rounds": len(seconds)}
    if load.flops:
        rate = load.flops * (3.5 if both else 1) / median
        return rates | {
            "tflop_s": rate / 1e12,
            "share_of_gemm": rate / setting.gemm_rate,
            "gemm_tflop_s": setting.gemm_rate / 1e12,
        }
    rate = (load.forward + both * load.backward) / median
    return rates | {"gb_s": rate / 1e9, "share_of_copy": rate / setting.copy_rate, "copy_gb_s": setting.copy_rate / 1e9}
