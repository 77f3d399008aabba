"""varlen_attention: the one door to attention over packed sequences; it alone knows which implementation runs.

    out[i] = sum over the keys j of i's sequence of softmax_j(q[i] . k[j] / sqrt(d)) v[j]

Traffic, e bytes an element, Tq queries, Tk keys, H heads: forward (2 Tq + 2 Tk) H d e, in the ways that keep scores on
chip (flash, varlen, xformers, short); sdpa and matmul pad ragged sequences to the longest, matmul writes the scores too.

| way | what runs | where |
|---|---|---|
| flash | flash-attn | CUDA, bf16 and fp16 |
| varlen | torch.nn.attention.varlen (torch's own FlashAttention) | CUDA, bf16 and fp16 |
| xformers | memory_efficient_attention under a block-diagonal mask | CUDA, bf16 and fp16 |
| short | short_attention: at most 256 keys, heads of at most 64; only by name | CUDA |
| sdpa | scaled_dot_product_attention, padded, or a call a sequence on a CPU | anywhere |
| matmul | matmul, softmax, matmul, padded | anywhere |
| auto | the first of flash, varlen, xformers that is there, else sdpa; in fp32 sdpa; on a CPU in bf16 matmul | anywhere |
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch

WAYS = ("auto", "flash", "varlen", "xformers", "short", "sdpa", "matmul")
# Below this length one padded call beats a call a sequence in fp32 on a CPU (measured: 40 to 64 tokens either way).
PAD_BELOW = 64

# What is known of the packages: plain dictionaries, which torch.compile reads without a break. A package is imported when
# it is first wanted; one that is not installed is known beforehand, as no import that fails can be compiled.
_found: dict[str, Callable[..., Tensor]] = {}
_absent: dict[str, str] = {
    way: f"no module named {package}"
    for way, package in (("flash", "flash_attn"), ("xformers", "xformers"))
    if find_spec(package) is None
}


def varlen_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int = 0, max_k: int = 0
) -> Tensor:
    """As varlen_attention, a sequence at a time; the maxima are not needed."""
    split = zip(
        q.split(cu_seqlens_q.diff().tolist()),
        k.split(cu_seqlens_k.diff().tolist()),
        v.split(cu_seqlens_k.diff().tolist()),
        strict=True,
    )
    heads = ([x.transpose(0, 1) for x in one] for one in split)  # (H, rows, d)
    outs = [(a @ b.mT * q.shape[2] ** -0.5).softmax(dim=-1) @ c for a, b, c in heads]
    none = q[:0] + k[:0] + v[:0]  # without a sequence, too, the result is a function of all three
    return torch.cat([none, *(out.transpose(0, 1) for out in outs)])


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int, way: str
) -> Tensor:
    """The ways `sdpa` and `matmul`: sequences of one length as they lie, ragged ones padded or one by one."""
    sequences = len(cu_seqlens_q) - 1
    dense = _sdpa if way == "sdpa" else _matmul
    if not q.shape[0] or not k.shape[0]:  # nothing to look up; a product with nothing keeps the gradients, zeros
        return _matmul(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), None).transpose(0, 1).contiguous()
    if q.shape[0] == sequences * max_q and k.shape[0] == sequences * max_k:
        out = dense(_heads(q, max_q), _heads(k, max_k), _heads(v, max_k), None)
        return out.transpose(1, 2).reshape(q.shape)
    one_by_one = way == "sdpa" and q.device.type == "cpu" and max_k > PAD_BELOW and not torch.compiler.is_compiling()
    if one_by_one:
        return _each(q, k, v, cu_seqlens_q, cu_seqlens_k)
    return _padded(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, dense)


def _heads(x: Tensor, length: int) -> Tensor:
    """(S * length, H, d) -> (S, H, length, d)"""
    return x.unflatten(0, (-1, length)).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1).to(v.dtype) @ v


def _each(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """One SDPA call a sequence: no padded work, for long ragged sequences on a CPU."""
    sizes = [cu_seqlens.diff().tolist() for cu_seqlens in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)]
    split = (x.split(size) for x, size in zip((q, k, v), sizes, strict=True))
    outs = []
    for one in zip(*split, strict=True):
        way = _sdpa if one[0].shape[0] and one[1].shape[0] else _matmul  # SDPA on a CPU makes NaN of no keys
        outs.append(way(*(x.transpose(0, 1)[None] for x in one), None)[0].transpose(0, 1))
    return torch.cat(outs)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int, dense: Callable
) -> Tensor:
    """Pad every sequence to the longest, mask the padding's keys, drop the padding's queries."""
    q_slot, k_slot = _slots(cu_seqlens_q, max_q, q.shape[0]), _slots(cu_seqlens_k, max_k, k.shape[0])
    sequences = len(cu_seqlens_q) - 1
    lengths = cu_seqlens_k.diff().clamp_min(1)  # no keys: one zero key, not NaN
    mask = (torch.arange(max_k, device=q.device) < lengths[:, None])[:, None, None]  # (S, 1, 1, max_k)

    def pad(x: Tensor, slot: Tensor, longest: int) -> Tensor:
        return _heads(x.new_zeros(sequences * longest, *x.shape[1:]).index_copy(0, slot, x), longest)

    out = dense(pad(q, q_slot, max_q), pad(k, k_slot, max_k), pad(v, k_slot, max_k), mask)
    return out.transpose(1, 2).reshape(-1, *q.shape[1:]).index_select(0, q_slot)


def _slots(cu_seqlens: Tensor, longest: int, rows: int) -> Tensor:
    """(T,) where each row lies once every sequence is padded to the longest."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    shift = torch.arange(len(lengths), device=starts.device) * longest - starts
    return torch.arange(rows, device=starts.device) + torch.repeat_interleave(shift, lengths, output_size=rows)


def missing(way: str) -> str:
    """Why a library's implementation cannot run, or nothing."""
    if way not in _found and way not in _absent:
        try:
            _found[way] = load(way)
        except ImportError as error:
            _absent[way] = str(error)
    return _absent.get(way, "")


def library(way: str) -> Callable[..., Tensor]:
    """The implementation of a way that keeps scores on chip; ImportError where its package does not load."""
    if way not in _found:
        _found[way] = load(way)
    return _found[way]


def load(way: str) -> Callable[..., Tensor]:
    if way == "short":
        from .short_attention import short_attention

        return short_attention
    if way == "flash":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func
    if way == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    @functools.lru_cache(maxsize=8)  # every layer of a network asks with the same tensors: one wait a batch, not a layer
    def ragged(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *_versions: int):
        return BlockDiagonalMask.from_seqlens(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist())

    @functools.lru_cache(maxsize=64)
    def even(sequences: int, max_q: int, max_k: int, _device: torch.device):
        return BlockDiagonalMask.from_seqlens([max_q] * sequences, [max_k] * sequences)

    def xformers(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int) -> Tensor:
        sequences = len(cu_seqlens_q) - 1
        if q.shape[0] == sequences * max_q and k.shape[0] == sequences * max_k:
            bias = even(sequences, max_q, max_k, q.device)
        else:
            versions = [0 if x.is_inference() else x._version for x in (cu_seqlens_q, cu_seqlens_k)]
            bias = ragged(cu_seqlens_q, cu_seqlens_k, *versions)
        return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]

    return xformers


def attention_way(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that `name` means for tensors of this device and dtype: itself, or what `auto` chooses.

    Raises:
        ValueError: an unknown way, or one that cannot run here.
    """
    if name not in WAYS:
        raise ValueError(f"attention: {name} is no way; use one of {', '.join(WAYS)}")
    if name in ("sdpa", "matmul"):
        return name
    if name == "short":
        if reason := dispatch.unusable(device.type):
            raise ValueError(f"attention: short cannot run here ({reason}); use auto")
        return name
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        if name != "auto":
            raise ValueError(f"attention: {name} needs a CUDA device and bf16 or fp16, not {dtype} on {device.type}; use auto")
        return "matmul" if device.type != "cuda" and dtype == torch.bfloat16 else "sdpa"
    if name == "auto":
        return next((way for way in ("flash", "varlen", "xformers") if not missing(way)), "sdpa")
    if missing(name):
        raise ValueError(f"attention: {name} cannot run here ({missing(name)}); use auto")
    return name


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    way: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sequence.

    No way waits for the device or breaks a compiled graph but xformers, whose mask is made from lists: once for each pair
    of cu_seqlens, and not where all sequences have one length. Equal lengths are known without reading them: T rows are S
    times the maximum.

    Args:
        q: (Tq, H, d), fp32, bf16 or fp16 (fp64 too in the ways sdpa and matmul).
        k, v: (Tk, H, d), in the dtype of q.
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32, where each sequence starts; sequence s of q attends to sequence s of k.
            They must name every row. A sequence may have no queries; queries without keys get zeros.
        max_q, max_k: the longest sequence of either, or more: ints.
        way: which implementation runs; see attention_way.

    Returns:
        (Tq, H, d), in the dtype of q.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or way; wrong cu_seqlens (CPU and debug only).
    """
    check_packed("varlen_attention", q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    way = attention_way(way, q.device, q.dtype)
    dense = way in ("sdpa", "matmul") or not q.shape[0]
    if dense:
        return dense_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, way)
    return library(way)(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k)


def check_packed(
    op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int
) -> None:
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
        if torch.compiler.is_compiling() or q.is_meta or not (dispatch.DEBUG or q.device.type == "cpu"):
            continue
        lengths = cu_seqlens.diff()
        if int(cu_seqlens[0]) or int(cu_seqlens[-1]) != rows or (len(lengths) and int(lengths.min()) < 0):
            raise ValueError(f"{op}: cu_seqlens_{name} must rise from 0 to the {rows} rows of {name}, and name every one")
        if len(lengths) and int(lengths.max()) > most:
            raise ValueError(f"{op}: max_{name} is {most}, but a sequence has {int(lengths.max())} rows")
