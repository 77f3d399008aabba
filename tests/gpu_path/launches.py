"""Launches of every op on a fake card: `python -m tests.gpu_path.launches cuda:1`; Triton's launch is checked, not made.

The cases and the ways to call them are those of tests/ops/test_paths.py, which `make gpu-check` runs, with a default device.
"""

import inspect
import sys
from functools import partial

from tests.support.fake_card import FakeCard, counted_graphs  # before torch

import torch  # isort: skip
from torch import Tensor
from torch.library import CustomOpDef
from triton.runtime.jit import JITFunction

from fastjepa_kernels.cases import CASES
from tests.ops.paths import called, compiled, outcome, replayed
from tests.support.card_cases import tell_faults

MODULES = [module for name, module in sys.modules.items() if name.startswith("fastjepa_kernels.")]
OPS = {thing._qualname: thing for module in MODULES for thing in vars(module).values() if isinstance(thing, CustomOpDef)}
KERNELS = {
    name for module in MODULES for name, thing in vars(module).items() if isinstance(thing, JITFunction) and "_kernel" in name
}
WAYS = {"called": called, "replayed": replayed}
launched: set[str] = set()


class LaunchCard(FakeCard):
    """A fake card that runs the launchers as well as the registered fakes of the ops, and compares what they return."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        promised = super().__torch_dispatch__(func, types, args, kwargs)
        op = OPS.get(f"{func.namespace}::{func._opname}")
        if op is not None:
            with self:
                returned = op._init_fn(*args, **kwargs or {})
            assert layout_of(returned) == layout_of(promised), f"{func}: {layout_of(returned)}, its fake {layout_of(promised)}"
        return promised

    def launch(self, kernel: JITFunction, *args, grid: tuple[int, ...], warmup: bool, **options) -> None:
        """Stand in for Triton's launch, which takes the current card whatever its tensors are on."""
        given = (
            inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in options.items() if k in kernel.arg_names}).arguments
        )
        devices = {str(one.device) for one in given.values() if isinstance(one, Tensor)}
        assert devices == {f"cuda:{self.current}"}, f"{kernel.fn.__name__} of {devices} is launched on cuda:{self.current}"
        assert all(0 < programs < 1 << 31 for programs in grid), f"{kernel.fn.__name__}: grid {grid}"
        launched.add(kernel.fn.__name__)


def layout_of(returned: Tensor | tuple | None) -> list[tuple]:
    """Return shape, dtype, strides and device of each result."""
    results = returned if isinstance(returned, tuple | list) else [returned]
    return [(tuple(x.shape), x.dtype, x.stride(), str(x.device)) for x in results if x is not None]


def take_case(name: str, device: str) -> None:
    """Call one case in one way: plainly, compiled as one graph, or in a capture, which waits for nothing."""
    op, variant, way = name.split()
    with LaunchCard() as card, torch.device(device):
        JITFunction.run = lambda kernel, *args, **options: card.launch(kernel, *args, **options)
        if way == "compiled":
            with counted_graphs() as graphs:
                outcome(op, int(variant), compiled)
            assert len(graphs) == 1, graphs
        else:
            outcome(op, int(variant), WAYS[way])
            waits = [wait for wait in card.waits if wait.callers & {"called", "replayed"}]  # not while the case is made
            assert [wait.what for wait in waits] == ["torch.cuda.synchronize"] * (way == "replayed"), waits  # at its end


def case_names() -> list[str]:
    every = [f"{op} {number} called" for op, (_, variants) in CASES.items() for number in range(len(variants))]
    return every + [f"{op} 0 {way}" for op in CASES for way in ("compiled", "replayed")]


def all_launched(_: str) -> None:
    assert launched == KERNELS, f"never launched: {KERNELS - launched}"


if __name__ == "__main__":
    tell_faults(case_names(), partial(take_case, device=sys.argv[1]))
    tell_faults(["every kernel"], all_launched)
