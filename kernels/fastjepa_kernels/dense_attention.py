"""Attention over packed sequences by dense products of torch: the ways `sdpa` and `matmul`, which run on any device.

Packed rows lie end to end: sequences of 2, 4 and 1 rows are 7 rows with cu_seqlens [0, 2, 6, 7]. Dense products want one
length. Where all sequences have it, rows are only viewed anew; ragged ones are padded to the longest, or run one by one.

On a CPU short sequences cost more to lay out than to multiply. There one gather pads the rows and brings those of each head
of a sequence side by side, as batched products want them, and one gather brings the result back.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch

# To this length one padded call beats a call a sequence in fp32 on a CPU (measured: 40 to 64 tokens either way).
PAD_BELOW = 64
VECTOR = 8  # keys that short sequences are padded to a multiple of on a CPU: a softmax then has no remainder


class PackedQKV(NamedTuple):
    """Queries, keys and values of many sequences laid end to end; sequence s of q attends to sequence s of k."""

    q: Tensor  # (Tq, H, d)
    k: Tensor  # (Tk, H, d)
    v: Tensor  # (Tk, H, d)
    cu_seqlens_q: Tensor  # (S + 1,) int32: where each sequence starts, and the end
    cu_seqlens_k: Tensor  # (S + 1,) int32
    max_q: int  # the longest sequence of q, or more
    max_k: int

    @property
    def sequences(self) -> int:
        return len(self.cu_seqlens_q) - 1


def dense_attention(packed: PackedQKV, way: str) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v within each sequence, (Tq, H, d), by `sdpa` or `matmul`."""
    q, k, v = packed.q, packed.k, packed.v
    dense = _sdpa if way == "sdpa" else _matmul
    eager_cpu = q.device.type == "cpu" and not torch.compiler.is_compiling()
    if not q.shape[0] or not k.shape[0]:  # nothing to look up; a product with nothing keeps the gradients, zeros
        return _matmul(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), None).transpose(0, 1).contiguous()
    # S sequences of at most max rows have S * max rows only where each has exactly max: known without reading a length.
    if q.shape[0] == packed.sequences * packed.max_q and k.shape[0] == packed.sequences * packed.max_k:
        out = dense(_heads(q, packed.max_q), _heads(k, packed.max_k), _heads(v, packed.max_k), None)  # (S, H, max_q, d)
        return out.transpose(1, 2).reshape(q.shape)
    if way == "sdpa" and eager_cpu and packed.max_k > PAD_BELOW:
        return _each(packed)
    if eager_cpu and packed.max_k <= PAD_BELOW and not dispatch.transformed():
        return _gathered(packed, dense)
    return _padded(packed, dense)


def _heads(x: Tensor, length: int) -> Tensor:
    """View (S * length, H, d) rows as (S, H, length, d)."""
    return x.unflatten(0, (-1, length)).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Multiply, softmax and multiply; a mask is bool, or what to add to the scores, as SDPA takes it."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (..., queries, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1).to(v.dtype) @ v


def _each(packed: PackedQKV) -> Tensor:
    """Call SDPA once for each sequence: no padded work, for long ragged sequences on a CPU."""
    starts = (packed.cu_seqlens_q, packed.cu_seqlens_k, packed.cu_seqlens_k)
    split = (x.split(cu_seqlens.diff().tolist()) for x, cu_seqlens in zip(packed[:3], starts, strict=True))
    outs = []
    for one in zip(*split, strict=True):
        dense = _sdpa if one[0].shape[0] and one[1].shape[0] else _matmul  # SDPA on a CPU makes NaN of no keys
        outs.append(dense(*(x.transpose(0, 1)[None] for x in one), None)[0].transpose(0, 1))
    return torch.cat(outs)


def _padded(packed: PackedQKV, dense: Callable[..., Tensor]) -> Tensor:
    """Pad every sequence to the longest, mask the padding's keys, drop the padding's queries."""
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k = packed
    q_slot, k_slot = _slots(cu_seqlens_q, max_q, q.shape[0]), _slots(cu_seqlens_k, max_k, k.shape[0])
    lengths = cu_seqlens_k.diff().clamp_min(1)  # no keys: one zero key, not NaN
    mask = (torch.arange(max_k, device=q.device) < lengths[:, None])[:, None, None]  # (S, 1, 1, max_k)

    def pad(x: Tensor, slot: Tensor, longest: int) -> Tensor:
        blank = x.new_zeros(packed.sequences * longest, *x.shape[1:])
        return _heads(blank.index_copy(0, slot, x), longest)  # (S, H, longest, d)

    out = dense(pad(q, q_slot, max_q), pad(k, k_slot, max_k), pad(v, k_slot, max_k), mask)
    return out.transpose(1, 2).reshape(-1, *q.shape[1:]).index_select(0, q_slot)


class HeadSlots(NamedTuple):
    """Slots of T packed rows with H heads in a tensor (S, H, longest, d): the rows of a head of a sequence, then padding.

    Example: sequences of 2 and 1 rows, 2 heads, longest 2. Rows (0, 1), (0, 1), (2, -), (2, -) lie in slots 0 to 7.
    """

    size: tuple[int, int, int]  # S, H, longest
    row: Tensor  # (S * H * longest,) int64, the row in each slot: 0 1 0 1 2 2 2 2; in padding it is any row
    head: Tensor  # the head of each slot: 0 0 1 1 0 0 1 1
    padding: Tensor  # (P,) int64, the slots that are padding: 5 7
    slot: Tensor  # (T * H,) int64, the slot of each head of each row: 0 2 1 3 4 6
    bias: Tensor  # (S, 1, 1, longest) fp32: -inf in padding, else 0; no keys at all: one counts, whose value is 0

    @classmethod
    def of(cls, cu_seqlens: Tensor, longest: int, rows: int, heads: int) -> "HeadSlots":
        """Return the slots of a packing; those of the last few are kept, as all layers of a network ask for the same."""
        version = 0 if cu_seqlens.is_inference() else cu_seqlens._version  # one that is written in place keeps its identity
        return _head_slots(cu_seqlens, version, longest, rows, heads)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is kept may be wanted for a backward pass later
def _head_slots(cu_seqlens: Tensor, _version: int, longest: int, rows: int, heads: int) -> HeadSlots:
    starts, lengths = cu_seqlens[:-1, None].long(), cu_seqlens.diff()[:, None]
    device = cu_seqlens.device
    place, head = torch.arange(longest, device=device), torch.arange(heads, device=device)[:, None]
    row = (starts + place).clamp_(max=rows - 1)[:, None].expand(-1, heads, -1).flatten()
    is_padding = (place >= lengths)[:, None].expand(-1, heads, -1)  # (S, H, longest)
    of_first_head = (place < lengths).flatten().nonzero()  # (T, 1) in (S, longest): slot 2 of 3 heads is slot 6 of the first
    slot = of_first_head // longest * (heads * longest) + of_first_head % longest + (head * longest).T
    bias = torch.zeros(len(starts), 1, 1, longest, device=device)
    bias.masked_fill_((place >= lengths.clamp_min(1))[:, None, None], -torch.inf)
    size = len(starts), heads, longest
    padding = is_padding.flatten().nonzero().flatten()
    return HeadSlots(size, row, head.expand(len(starts), heads, longest).flatten(), padding, slot.flatten(), bias)


class _ToHeads(torch.autograd.Function):
    """Bring rows (T, H, d), slices of a packed qkv too, to their slots (S, H, longest, d), with zeros in padding."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: HeadSlots) -> Tensor:
        ctx.slots = slots
        _, heads, width = x.shape
        if x.stride(2) != 1 or x.stride(1) != width or x.stride(0) % width:
            x = x.contiguous()
        step = x.stride(0) // width  # head h of row t is row t * step + h of the rows of d numbers that x lies among
        rows = x.as_strided(((len(x) - 1) * step + heads, width), (width, 1))
        out = rows.index_select(0, torch.add(slots.head, slots.row, alpha=step))
        if len(slots.padding):
            out.index_fill_(0, slots.padding, 0)
        return out.view(*slots.size, width)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, None]:
        return _ToRows.apply(dout, ctx.slots), None


class _ToRows(torch.autograd.Function):
    """Bring slots (S, H, longest, d) back to rows (T, H, d): each of the two is the gradient of the other."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: HeadSlots) -> Tensor:
        ctx.slots = slots
        return x.reshape(-1, x.shape[3]).index_select(0, slots.slot).view(-1, slots.size[1], x.shape[3])

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, None]:
        return _ToHeads.apply(dout, ctx.slots), None


def _gathered(packed: PackedQKV, dense: Callable[..., Tensor]) -> Tensor:
    """Do as `_padded` does with one gather there and one back, which also bring the rows of a head side by side."""
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k = packed
    queries = HeadSlots.of(cu_seqlens_q, max_q, q.shape[0], q.shape[1])
    keys = HeadSlots.of(cu_seqlens_k, -(-max_k // VECTOR) * VECTOR, k.shape[0], k.shape[1])
    q, k, v = _ToHeads.apply(q, queries), _ToHeads.apply(k, keys), _ToHeads.apply(v, keys)  # (S, H, max, d)
    return _ToRows.apply(dense(q, k, v, keys.bias.to(q.dtype) if len(keys.padding) else None), queries)


def _slots(cu_seqlens: Tensor, longest: int, rows: int) -> Tensor:
    """Return (T,): the place of each row once every sequence is padded to the longest.

    cu_seqlens [0, 2, 6, 7] and longest 4: sequence s starts at 4 s, so its rows move by [0, 4 - 2, 8 - 6] = [0, 2, 2], and
    rows 0 1 | 2 3 4 5 | 6 go to 0 1 | 4 5 6 7 | 8; places 2, 3, 9, 10 and 11 are padding.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    shift = torch.arange(len(lengths), device=starts.device) * longest - starts  # (S,)
    return torch.arange(rows, device=starts.device) + torch.repeat_interleave(shift, lengths, output_size=rows)


def check_packed(op: str, packed: PackedQKV) -> None:
    """Raise ValueError or TypeError where shapes, dtypes, devices or (on a CPU, or in debug mode) lengths do not fit."""
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k = packed
    if q.ndim != 3 or k.ndim != 3 or v.shape != k.shape or k.shape[1:] != q.shape[1:]:
        raise ValueError(
            f"{op}: q (Tq, H, d) needs k and v (Tk, H, d); got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise TypeError(f"{op}: q, k and v must have one floating-point dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if cu_seqlens_q.ndim != 1 or not len(cu_seqlens_q) or cu_seqlens_k.shape != cu_seqlens_q.shape:
        got = f"{tuple(cu_seqlens_q.shape)}, {tuple(cu_seqlens_k.shape)}"
        raise ValueError(f"{op}: cu_seqlens_q and cu_seqlens_k must both be (S + 1,); got {got}")
    dispatch.check_device(op, q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    for name, cu_seqlens, rows, most in (("q", cu_seqlens_q, q.shape[0], max_q), ("k", cu_seqlens_k, k.shape[0], max_k)):
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"{op}: cu_seqlens_{name} must be int32, not {cu_seqlens.dtype}; .int() converts it")
        if dispatch.may_read(q):
            _check_lengths(op, name, cu_seqlens, rows, most)


def _check_lengths(op: str, name: str, cu_seqlens: Tensor, rows: int, most: int) -> None:
    """Raise ValueError where the starts do not rise from 0 to the rows, or a sequence is longer than said."""
    lengths = cu_seqlens.diff()
    if int(cu_seqlens[0]) or int(cu_seqlens[-1]) != rows or (len(lengths) and int(lengths.min()) < 0):
        raise ValueError(f"{op}: cu_seqlens_{name} must rise from 0 to the {rows} rows of {name}, and name every one")
    if len(lengths) and int(lengths.max()) > most:
        raise ValueError(f"{op}: max_{name} is {most}, but a sequence has {int(lengths.max())} rows")
