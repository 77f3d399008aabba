"""Calls of every op for the inspector, at the trainer's widths and few rows, each with the bytes that it cannot do without.

Tensors are made on torch's default device: the CPU for the inspector; a check on a card sets it to that card.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adamw_ema_step import adamw_ema_step_, adamw_ema_table
from .assemble_predictor import assemble_predictor
from .ema_update import ema_table, ema_update_
from .gather_tokens import gather_tokens, gather_tokens_repeated, occurrences
from .patchify_tokens import patchify_tokens
from .scatter_tokens import scatter_tokens
from .short_attention import short_attention
from .target_loss import target_loss


class Case(NamedTuple):
    """A call of a public op, and the tensors that must move at least; dout, results and gradients are counted besides."""

    call: Callable[[], Any]
    reads: list[Tensor]
    leaves: list[Tensor] = ()  # get gradients
    back_reads: list[Tensor] = ()  # besides dout
    dout_rows: int | None = None  # rows of dout that the gradients need; all of them where this is None
    writes: list[Tensor] = ()  # besides the result


def _some(total: int, count: int) -> Tensor:
    return torch.randperm(total)[:count].int()


def _gather_tokens(width: int, dtype: torch.dtype) -> Case:
    x, idx = torch.randn(167, width).to(dtype), _some(167, 79)
    return Case(lambda: gather_tokens(x, idx), reads=[x[:79], idx], leaves=[x], back_reads=[idx])


def _gather_tokens_repeated(width: int, dtype: torch.dtype) -> Case:
    x, idx = torch.randn(37, width).to(dtype), torch.randint(37, (113,)).int()
    repeats, named = occurrences(idx, 37), idx.unique()
    return Case(
        lambda: gather_tokens_repeated(x, idx, repeats), reads=[x[: len(named)], idx], leaves=[x], back_reads=[*repeats]
    )


def _scatter_tokens(width: int, dtype: torch.dtype, filled: str) -> Case:
    x, idx = torch.randn(79, width).to(dtype), _some(167, 79)
    if filled == "zeros":
        return Case(lambda: scatter_tokens(x, idx, 167), reads=[x, idx], leaves=[x], back_reads=[idx], dout_rows=79)
    fill, positions = torch.randn(width), torch.randn(167, width).to(dtype)
    return Case(
        lambda: scatter_tokens(x, idx, 167, fill, positions),
        reads=[x, idx, fill, positions], leaves=[x, fill], back_reads=[idx],
    )  # fmt: skip


def _assemble_predictor(width: int, dtype: torch.dtype) -> Case:
    context, positions, mask_token = torch.randn(53, width).to(dtype), torch.randn(31, width).to(dtype), torch.randn(width)
    context_idx, idx = _some(31, 31).repeat(2)[:53], torch.cat((_some(53, 53).repeat(3), 53 + _some(31, 31).repeat(4)))
    repeats, seen = occurrences(idx, 84), idx[idx < 53]
    return Case(
        lambda: assemble_predictor(context, context_idx, positions, mask_token, idx, repeats),
        reads=[context, context_idx, positions, mask_token, idx],
        leaves=[context, mask_token], back_reads=[seen, repeats[1][:54], idx],
    )  # fmt: skip


def _patchify_tokens(patch: int, layout: str, source: torch.dtype, dtype: torch.dtype) -> Case:
    images = torch.randint(256, (2, 3, 6 * patch, 6 * patch)).to(source)
    if layout == "NHWC":
        images = images.contiguous(memory_format=torch.channels_last)
    idx, mean, std = _some(72, 37), torch.rand(3), torch.rand(3) + 0.5
    read = images.flatten()[: 37 * 3 * patch**2]
    return Case(lambda: patchify_tokens(images, idx, mean, std, patch, dtype), reads=[read, idx, mean, std])


def _target_loss(width: int, dtype: torch.dtype, kind: str, layers: int = 1, parts: int = 1) -> Case:
    """Count one pass more in the backward: it scales the gradient by a number that no host knows, which is part of the op."""
    prediction, features = torch.randn(43, parts * width).to(dtype), [torch.randn(53, width).to(dtype) for _ in range(layers)]
    idx, weight = _some(53, 43), torch.rand(43)
    return Case(
        lambda: target_loss(prediction, features, idx, weight, kind),
        reads=[prediction, *(layer[:43] for layer in features), idx, weight], leaves=[prediction],
        writes=[prediction], back_reads=[prediction, weight],
    )  # fmt: skip


def _parameters(width: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in ((width, 4 * width), (width,), (3, 3, 5), (3 * width,))]


def _ema_update(width: int, target: torch.dtype, source: torch.dtype, copied: str) -> Case:
    targets, sources = _parameters(width, target), _parameters(width, source)
    copies = _parameters(width, BF16) if copied == "copied" else None
    table, momentum, finite = ema_table(targets, sources, copies), torch.tensor(0.996), torch.tensor(True)
    return Case(
        lambda: ema_update_(targets, sources, momentum, finite, copies, table),
        reads=[*targets, *sources], writes=[*targets, *(copies or ())],
    )  # fmt: skip


def _adamw_ema_step(width: int, grad: torch.dtype, copied: str) -> Case:
    params, moments, squares = (_parameters(width, FP32) for _ in range(3))
    grads, targets = _parameters(width, grad), _parameters(width, FP32)
    squares = [square.abs() for square in squares]
    copies = _parameters(width, BF16) if copied == "copied" else ()
    steps, hyper = torch.ones(len(params)), torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 0.05]], dtype=torch.float64)
    groups, momentum, finite = [0] * len(params), torch.tensor(0.996), torch.tensor(True)
    table = adamw_ema_table(params, grads, moments, squares, groups, targets, copies)
    return Case(
        lambda: adamw_ema_step_(
            params, grads, moments, squares, steps, hyper, groups, targets, momentum, copies, finite, table
        ),
        reads=[*params, *grads, *moments, *squares, *targets, steps],
        writes=[*params, *moments, *squares, *targets, *copies, steps],
    )  # fmt: skip


def _short_attention(head: int, dtype: torch.dtype) -> Case:
    """Take fp16 for bf16, whose products the interpreter makes in fp32: that would be another kernel."""
    starts = torch.tensor([0, 61, 98, 235], dtype=torch.int32)
    q, k, v = (torch.randn(235, 3, head).to(dtype) for _ in range(3))
    lse = torch.zeros(235, 3)
    return Case(
        lambda: short_attention(q, k, v, starts, starts, 137, 137),
        reads=[q, k, v, starts, starts], leaves=[q, k, v], writes=[lse], back_reads=[q, k, v, lse, starts, starts],
    )  # fmt: skip


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDTHS = [(768, BF16), (1024, BF16), (1280, BF16), (1408, BF16), (384, FP32)]  # ViT-B, L, H, g; a predictor in fp32
CASES = {
    "gather_tokens": (_gather_tokens, WIDTHS),
    "gather_tokens_repeated": (_gather_tokens_repeated, WIDTHS),
    "scatter_tokens": (_scatter_tokens, [(768, BF16, "zeros"), *((*variant, "filled") for variant in WIDTHS)]),
    "assemble_predictor": (_assemble_predictor, [(384, BF16), (384, FP32), (768, BF16)]),
    "target_loss": (
        _target_loss,
        [
            *((*variant, "smooth_l1") for variant in WIDTHS),
            (1280, BF16, "l2"),
            (1280, BF16, "cosine"),
            *((1280, BF16, "smooth_l1", 4, parts) for parts in (4, 1)),
        ],  # fmt: skip
    ),
    "ema_update": (_ema_update, [(96, FP32, FP32, "alone"), (96, FP32, FP32, "copied"), (96, BF16, BF16, "alone")]),
    "patchify_tokens": (
        _patchify_tokens,
        [
            (16, "NCHW", torch.uint8, BF16),
            (16, "NHWC", torch.uint8, BF16),
            (14, "NCHW", torch.uint8, BF16),
            (16, "NCHW", FP32, FP32),
        ],
    ),
    "short_attention": (_short_attention, [(24, FP16), (32, FP16), (64, FP16), (24, FP32)]),
    "adamw_ema_step": (_adamw_ema_step, [(96, FP32, "alone"), (96, FP32, "copied"), (96, BF16, "copied")]),
}
PROMISED = set(CASES) - {"short_attention"}
UNALIGNED = {  # (op, how the case begins, load or store): rows that 16 bytes do not divide, or whose values lie apart
    ("patchify_tokens", "14", "load"),
    ("patchify_tokens", "14", "store"),
    ("patchify_tokens", "16 NHWC", "load"),
}
