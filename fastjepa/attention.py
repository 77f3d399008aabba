"""The one attention function of the networks, over packed sequences; it alone knows which implementation runs."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.config import ConfigError
from fastjepa.packing import Packed

# Below this length one padded call beats a call a sequence in fp32 on a CPU (measured: 40 to 64 tokens either way).
PAD_BELOW = 64


def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation `runtime.attention: name` means here; ConfigError where the one asked for cannot run."""
    if name in ("sdpa", "matmul"):
        return name
    if device.type != "cuda" or dtype == torch.float32:
        if name != "auto":
            raise ConfigError(f"runtime.attention: {name} needs a CUDA device and runtime.dtype: bf16; use auto")
        if device.type == "cuda":
            return "sdpa"
        return "matmul" if dtype == torch.bfloat16 else "sdpa"
    missing = {way: reason for way in ("flash", "varlen", "xformers") if (reason := _missing(way))}
    if name == "auto":
        return next((way for way in ("flash", "varlen", "xformers") if way not in missing), "sdpa")
    if name in missing:
        raise ConfigError(f"runtime.attention: {name} cannot run here ({missing[name]}); use auto")
    return name


def attention(q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed, way: str) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sequence.

    Args:
        q: (Tq, H, d); k, v: (Tk, H, d), fp32, bf16 or fp16.
        queries, keys: sequence s of the one attends to sequence s of the other; only lengths are used.
        way: what `choose` returned.

    Returns:
        (Tq, H, d).
    """
    if way in ("flash", "varlen", "xformers"):
        return _varlen(way)(q, k, v, queries, keys)
    dense = _sdpa if way == "sdpa" else _matmul
    if queries.length is not None and keys.length is not None:
        out = dense(_heads(q, queries.length), _heads(k, keys.length), _heads(v, keys.length), None)
        return out.transpose(1, 2).reshape(q.shape)
    if way == "sdpa" and q.device.type == "cpu" and keys.max_len > PAD_BELOW:
        return _each(q, k, v, queries, keys)
    return _padded(q, k, v, queries, keys, dense)


def _heads(x: Tensor, length: int) -> Tensor:
    """(S * length, H, d) -> (S, H, length, d)"""
    return x.view(-1, length, *x.shape[1:]).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1).to(v.dtype) @ v


def _each(q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed) -> Tensor:
    """One SDPA call a sequence: no padded work, for long ragged sequences on a CPU."""
    sizes = [packed.cu_seqlens.diff().tolist() for packed in (queries, keys, keys)]
    split = (x.split(size) for x, size in zip((q, k, v), sizes, strict=True))
    return torch.cat(
        [_sdpa(*(x.transpose(0, 1)[None] for x in one), None)[0].transpose(0, 1) for one in zip(*split, strict=True)]
    )


def _padded(q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed, dense) -> Tensor:
    """Pad every sequence to the longest, mask the padding's keys, drop the padding's queries."""
    q_slot, k_slot = _slots(queries), _slots(keys)
    sequences = len(queries.cu_seqlens) - 1
    lengths = keys.cu_seqlens.diff()
    mask = (torch.arange(keys.max_len, device=q.device) < lengths[:, None])[:, None, None]  # (S, 1, 1, Lk)

    def pad(x: Tensor, slot: Tensor, longest: int) -> Tensor:
        return _heads(x.new_zeros(sequences * longest, *x.shape[1:]).index_copy(0, slot, x), longest)

    out = dense(pad(q, q_slot, queries.max_len), pad(k, k_slot, keys.max_len), pad(v, k_slot, keys.max_len), mask)
    return out.transpose(1, 2).reshape(-1, *q.shape[1:]).index_select(0, q_slot)


def _slots(packed: Packed) -> Tensor:
    """(T,) where each row lies once every sequence is padded to max_len."""
    starts, lengths = packed.cu_seqlens[:-1].long(), packed.cu_seqlens.diff().long()
    shift = torch.arange(len(lengths), device=starts.device) * packed.max_len - starts
    rows = packed.idx.shape[0]
    return torch.arange(rows, device=starts.device) + torch.repeat_interleave(shift, lengths, output_size=rows)


@functools.cache
def _missing(way: str) -> str:
    """Why an implementation cannot run, or nothing."""
    try:
        _varlen(way)
    except ImportError as error:
        return str(error)
    return ""


@functools.cache
def _varlen(way: str):
    """The library's function behind our argument order; its packages are imported only when it is wanted."""
    if way == "flash":
        from flash_attn import flash_attn_varlen_func as flash

        return lambda q, k, v, queries, keys: flash(q, k, v, queries.cu_seqlens, keys.cu_seqlens, queries.max_len, keys.max_len)
    if way == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        return lambda q, k, v, queries, keys: varlen_attn(
            q, k, v, queries.cu_seqlens, keys.cu_seqlens, queries.max_len, keys.max_len
        )
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    def xformers(q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed) -> Tensor:
        bias = BlockDiagonalMask.from_seqlens(queries.cu_seqlens.diff().tolist(), keys.cu_seqlens.diff().tolist())
        return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]

    return xformers
