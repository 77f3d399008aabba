"""The way an op is timed: each provider in turn, on inputs that no cache holds, beside the measured rates of the machine.

Rounds are timed by `timing.seconds_of`. Inputs are rotated through enough copies to pass twice the last cache. Bytes and
FLOPs are the least that the op needs, the same for every provider, so that a rate says how long a provider took.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import Ceiling, Spread, copy_rate, seconds_of, square_product
from torch import Tensor

DIRECTIONS = ("forward", "forward+backward")
ROUNDS = {"cuda": (50, 5), "cpu": (15, 2), "toy": (3, 1)}  # timed, to warm up
MOST_COPIES = 64
ATTENTION_BACKWARD = 2.5  # times the FLOPs of the forward: the scores are computed again


class Inputs(NamedTuple):
    """One set of inputs and the work that the op has to do on it."""

    args: tuple
    leaves: Sequence[Tensor] = ()  # get gradients
    forward: int = 0  # bytes read and written
    backward: int = 0
    flops: int = 0  # of the forward, where the op is bound by them
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


def beside_ours(ours: Callable, reference: Callable, rivals: dict[str, Provider | Callable]) -> dict[str, Provider | Callable]:
    """Return the providers of an op: its definition eager and compiled, the rivals, and ours."""
    return {"eager": reference, "compiled": compiled(reference), **rivals, "ours": ours}


def missing(module: str) -> str:
    return "" if importlib.util.find_spec(module) else f"{module} is not installed"


def nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


class CallClock:
    """The timer that pytest-benchmark reads: it stands still but for the calls that `run` times."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, call: Callable[[], Any], device: torch.device) -> float:
        taken = seconds_of(call, device)
        self.now += taken
        return taken


class Setting:
    """The device and the sizes of a run, and the rates of the machine, measured once in the same process."""

    def __init__(self, device: torch.device, toy: bool):
        self.device, self.toy, self.clock = device, toy, CallClock()
        self.scale = "toy" if toy else device.type
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.generator = torch.Generator(device).manual_seed(0)

    def pick(self, **by_scale: Any) -> Any:
        return by_scale[self.scale]

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def some(self, total: int, count: int) -> Tensor:
        """Return (count,) int32: distinct rows among `total`, rising, as masks name them."""
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
        return copy_rate(self.device)

    @functools.cached_property
    def gemm_rate(self) -> float:
        ceiling = Ceiling([(128, 128, 128) if self.toy else square_product(self.device)], self.dtype, self.device)
        ceiling(0)
        return ceiling.rates[0]


def record_skip(benchmark, setting: Setting, reason: str) -> None:
    """Keep the reason why a case is not measured; pytest-benchmark wants a round all the same."""
    benchmark.extra_info.update(device=str(setting.device), toy=setting.toy, not_measured=reason)
    benchmark.pedantic(lambda: None)


def record_rounds(benchmark, setting: Setting, run: Callable[[int], object]) -> float:
    """Warm `run` up, time its rounds and keep median, p20 and p80 in extra_info; return the median in seconds."""
    rounds, warmup = ROUNDS[setting.scale]
    for number in range(warmup):
        run(number)
    seconds, numbers = [], iter(range(rounds))
    call = lambda number: seconds.append(setting.clock.run(lambda: run(number), setting.device))  # noqa: E731
    benchmark.pedantic(call, setup=lambda: ((next(numbers),), {}), rounds=rounds)
    spread = Spread.of(seconds)
    benchmark.extra_info.update(device=str(setting.device), toy=setting.toy, rounds=rounds, median_s=spread.median,
                                p20_s=spread.p20, p80_s=spread.p80)  # fmt: skip
    return spread.median


def measure_provider(
    benchmark, setting: Setting, provider: Provider | Callable, make: Callable[[Setting], Inputs], direction: str
) -> None:
    """Time one provider; everything but pytest-benchmark's own statistics goes into extra_info."""
    provider = provider if isinstance(provider, Provider) else Provider(provider)
    benchmark.extra_info["direction"] = direction
    absent = "it runs on CUDA alone" if provider.cuda_only and setting.device.type != "cuda" else provider.absent
    if absent:
        record_skip(benchmark, setting, absent)
        return
    first = make(setting)
    size = first.size or nbytes(*(arg for arg in first.args if isinstance(arg, Tensor)))
    every = [first, *(make(setting) for _ in range(setting.copies(size) - 1))]
    call = provider.call
    if provider.compiles:  # toy runs look at the tracing alone: lowering it takes a compiler half a minute
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=provider.whole, dynamic=False, backend="aot_eager" if setting.toy else "inductor")
    steps = [_step(call, provider.prepare(one.args), one.leaves, direction) for one in every]
    steps[0]()
    benchmark.extra_info.update(peak_bytes=_peak(steps[0], setting.device), copies=len(every))
    median = record_rounds(benchmark, setting, lambda number: steps[number % len(steps)]())
    benchmark.extra_info.update(_rates(setting, first, direction != "forward", median))


def _step(call: Callable, args: tuple, leaves: Sequence[Tensor], direction: str) -> Callable[[], Any]:
    if direction == "forward":

        def forward():
            with torch.no_grad():
                call(*args)

        return forward
    for leaf in leaves:
        leaf.requires_grad_()
    dout = torch.ones_like(call(*args))
    return lambda: torch.autograd.grad(call(*args), leaves, dout)


def _peak(step: Callable[[], Any], device: torch.device) -> int | None:
    """Return the bytes that a call takes beyond its inputs; a CPU does not say."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _rates(setting: Setting, inputs: Inputs, both: bool, seconds: float) -> dict[str, float]:
    if inputs.flops:
        rate, best = inputs.flops * (1 + both * ATTENTION_BACKWARD) / seconds, setting.gemm_rate
        return {"tflop_s": rate / 1e12, "share_of_gemm": rate / best, "gemm_tflop_s": best / 1e12}
    rate, best = (inputs.forward + both * inputs.backward) / seconds, setting.copy_rate
    return {"gb_s": rate / 1e9, "share_of_copy": rate / best, "copy_gb_s": best / 1e9}
