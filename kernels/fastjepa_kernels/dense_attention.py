"""Attention over packed sequences by dense products of torch: the ways `sdpa` and `matmul`, which run on any device.

Packed rows lie end to end: sequences of 2, 4 and 1 rows are 7 rows with cu_seqlens [0, 2, 6, 7]. Dense products want one
length. Where all sequences have it, rows are only viewed anew; ragged ones are padded to the longest, or run one by one.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch

# Below this length one padded call beats a call a sequence in fp32 on a CPU (measured: 40 to 64 tokens either way).
PAD_BELOW = 64


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
    if not q.shape[0] or not k.shape[0]:  # nothing to look up; a product with nothing keeps the gradients, zeros
        return _matmul(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), None).transpose(0, 1).contiguous()
    # S sequences of at most max rows have S * max rows only where each has exactly max: known without reading a length.
    if q.shape[0] == packed.sequences * packed.max_q and k.shape[0] == packed.sequences * packed.max_k:
        out = dense(_heads(q, packed.max_q), _heads(k, packed.max_k), _heads(v, packed.max_k), None)  # (S, H, max_q, d)
        return out.transpose(1, 2).reshape(q.shape)
    on_cpu = q.device.type == "cpu" and not torch.compiler.is_compiling()
    if way == "sdpa" and on_cpu and packed.max_k > PAD_BELOW:
        return _each(packed)
    return _padded(packed, dense)


def _heads(x: Tensor, length: int) -> Tensor:
    """View (S * length, H, d) rows as (S, H, length, d)."""
    return x.unflatten(0, (-1, length)).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (..., queries, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
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
