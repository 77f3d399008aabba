"""Comparison of an op with its definition.

The house's tolerance: the error against the definition in fp32 is at most twice the one that the definition itself makes
in the op's dtype (and never asked to be below a few units in the last place).
"""

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def values_and_grads(f: Callable[..., Tensor], inputs: list, dout: Tensor | None = None) -> list[Tensor]:
    """Return f's result and the gradients of its floating-point inputs, under a given output gradient."""
    leaves = [x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
    out = f(*leaves)
    tracked = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    if not tracked:
        return [out]
    dout = torch.ones_like(out) if dout is None else dout
    return [out, *torch.autograd.grad(out, tracked, dout.to(out.dtype))]


def equal(op: Callable, ref: Callable, *inputs) -> None:
    """Assert that the op and its gradients have the definition's bits: for ops that only move rows."""
    dout = torch.randn_like(ref(*inputs).float()) if any(isinstance(x, Tensor) and x.requires_grad for x in inputs) else None
    for ours, theirs in zip(values_and_grads(op, inputs, dout), values_and_grads(ref, inputs, dout), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def as_good(op: Callable, ref: Callable, *inputs, units: float = 2.0) -> None:
    """Assert that the op's error against the fp32 definition is at most twice the definition's own in the inputs' dtype."""
    wide = [x.detach().float().requires_grad_(x.requires_grad) if _is_float(x) else x for x in inputs]
    exact_out = ref(*wide)
    dout = torch.randn_like(exact_out) if exact_out.ndim else torch.tensor(1.0, device=exact_out.device)
    if _is_float(inputs[0]):
        dout = dout.to(ref(*inputs).dtype).float()  # a gradient that the narrow dtype can hold
    exact = values_and_grads(ref, wide, dout)
    narrow = values_and_grads(ref, list(inputs), dout)
    ours = values_and_grads(op, list(inputs), dout)
    assert len(ours) == len(exact)
    largest = max((truth.abs().max() for truth in exact if truth.numel()), default=0.0)
    for got, plain, truth in zip(ours, narrow, exact, strict=True):
        assert got.dtype == plain.dtype and got.shape == truth.shape
        assert torch.isfinite(got).all()
        if not truth.numel():
            continue
        scale = truth.abs().max() or largest  # values that cancel to zeros are judged by the largest of the others
        floor = units * torch.finfo(got.dtype).eps * scale
        error, allowed = (got.float() - truth).abs().max(), 2 * (plain.float() - truth).abs().max() + floor
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def compiles_whole(f: Callable, *inputs) -> None:
    """Assert that torch.compile without a graph break gives the same, gradients included (the graph is run, not lowered)."""
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    dout = torch.randn_like(f(*inputs).float())
    for ours, theirs in zip(values_and_grads(compiled, inputs, dout), values_and_grads(f, inputs, dout), strict=True):
        torch.testing.assert_close(ours, theirs)


def some_rows(total: int, count: int, device: torch.device, seed: int = 0) -> Tensor:
    """Return (count,) int32: distinct rows among `total`, in no order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:count].int().to(device)


def _is_float(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
