"""varlen_attention: the one door to attention over packed sequences; it alone knows which implementation runs.

    out[i] = sum over the keys j of i's sequence of softmax_j(q[i] . k[j] / sqrt(d)) v[j]

Traffic, e bytes an element, Tq queries, Tk keys, H heads: forward (2 Tq + 2 Tk) H d e, in the ways that keep scores on
chip (flash, varlen, xformers, short); sdpa and matmul pad ragged sequences to the longest, matmul writes the scores too.

| way | implementation | where |
|---|---|---|
| flash | flash-attn's FlashAttention | CUDA, bf16 and fp16, heads of a multiple of 8 channels to 256 |
| varlen | torch.nn.attention.varlen, held to FlashAttention by WINDOW: never cuDNN | as flash |
| xformers | memory_efficient_attention under a block-diagonal mask | as flash |
| short | short_attention; only by name | CUDA, at most 256 tokens, heads of at most 64 |
| sdpa | scaled_dot_product_attention, padded, or a call a sequence on a CPU | anywhere |
| matmul | matmul, softmax, matmul, padded | anywhere |
| auto | the first of flash, varlen, xformers that can run, else sdpa; in fp32 sdpa | anywhere |
| | on a CPU matmul in bf16, and for at most 32 tokens | |

FlashAttention sums dq in no fixed order, unless torch.use_deterministic_algorithms asks for one: flash and varlen obey it.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from . import dispatch
from .dense_attention import PackedQKV, check_packed, dense_attention
from .short_attention import MOST, WIDEST, short_attention

LIBRARIES = ("flash", "varlen", "xformers")  # in the order that auto tries them
WAYS = ("auto", *LIBRARIES, "short", "sdpa", "matmul")

# The window (keys to the left and to the right) that varlen asks for, wider than any sequence, so that it hides no key. From
# 2.14 on torch takes cuDNN on sm_90 and sm_100 where there is no window: that plans anew for every number of rows, about 45
# ms each, keeps all plans, and has no deterministic backward. FlashAttention drops a window that covers the longest sequence.
WINDOW = 1 << 20

# To this length batched products beat SDPA in fp32 on a CPU, where each head of a sequence is a call of its own inside SDPA.
MATMUL_BELOW = 32

# Knowledge of the packages, in plain dictionaries, which torch.compile reads without a break; where one changes it compiles
# again. A package is imported when it is first wanted; one that is not installed is known beforehand, as no import that fails
# can be compiled.
_found: dict[str, Callable[..., Tensor]] = {"short": short_attention}
_absent: dict[str, str] = {
    way: f"no module named {package}"
    for way, package in (("flash", "flash_attn"), ("xformers", "xformers"))
    if find_spec(package) is None
}


def varlen_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int = 0, max_k: int = 0
) -> Tensor:
    """Compute varlen_attention a sequence at a time; the maxima are not needed."""
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


def missing(way: str) -> str:
    """Return the reason why a library's implementation cannot run, or an empty string."""
    if way not in _found and way not in _absent:
        try:
            _found[way] = load(way)
        except ImportError as error:
            _absent[way] = str(error)
    return _absent.get(way, "")


def library(way: str) -> Callable[..., Tensor]:
    """Return the implementation of a way that keeps scores on chip; ImportError where its package does not load."""
    if way not in _found:
        _found[way] = load(way)
    return _found[way]


def load(way: str) -> Callable[..., Tensor]:
    """Import the package of a way and return a function of (q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k)."""
    if way == "flash":
        import flash_attn  # noqa: F401

        return _flash
    if way == "varlen":
        import torch.nn.attention.varlen  # noqa: F401

        return _varlen
    return _load_xformers()


def _flash(*packed) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(*packed, deterministic=torch.are_deterministic_algorithms_enabled())


def _varlen(*packed) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(*packed, window_size=(WINDOW, WINDOW))


def _load_xformers() -> Callable[..., Tensor]:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    @functools.lru_cache(maxsize=8)  # every layer of a network asks with the same tensors: one wait a batch, not a layer
    def ragged(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *_versions: int):
        return BlockDiagonalMask.from_seqlens(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist())

    @functools.lru_cache(maxsize=64)
    def even(sequences: int, max_q: int, max_k: int, _device: torch.device):
        return BlockDiagonalMask.from_seqlens([max_q] * sequences, [max_k] * sequences)

    def xformers(*arguments) -> Tensor:
        packed = PackedQKV(*arguments)
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k = packed
        if q.shape[0] == packed.sequences * max_q and k.shape[0] == packed.sequences * max_k:  # all of one length
            bias = even(packed.sequences, max_q, max_k, q.device)
        else:
            # A tensor that is written in place keeps its identity: its version tells the cache apart.
            versions = [0 if x.is_inference() else x._version for x in (cu_seqlens_q, cu_seqlens_k)]
            bias = ragged(cu_seqlens_q, cu_seqlens_k, *versions)
        return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]

    return xformers


def attention_way(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None, longest: int | None = None
) -> str:
    """Return the implementation that `name` means for such tensors: itself, or the one that `auto` chooses.

    Args:
        name: one of WAYS.
        device, dtype: of q, k and v.
        head_dim: channels of a head; None: not known yet, and not judged.
        longest: rows of the longest sequence of q or k; None: as head_dim.

    Raises:
        ValueError: an unknown way, or one that cannot run here; one sentence with the remedy.
    """
    if name not in WAYS:
        raise ValueError(f"attention: {name} is no way; use one of {', '.join(WAYS)}")
    if name == "auto":
        if device.type != "cuda" and (dtype == torch.bfloat16 or longest is not None and longest <= MATMUL_BELOW):
            return "matmul"
        return next((way for way in LIBRARIES if not _obstacle(way, device, dtype, head_dim, longest)), "sdpa")
    if reason := _obstacle(name, device, dtype, head_dim, longest):
        raise ValueError(f"attention: {name} {reason}; use auto")
    return name


def _obstacle(way: str, device: torch.device, dtype: torch.dtype, head_dim: int | None, longest: int | None) -> str:
    """Return the reason why a way cannot run, or an empty string."""
    if way in ("sdpa", "matmul"):
        return ""
    if way == "short":
        if reason := dispatch.unusable(device.type):
            return f"cannot run here ({reason})"
        if dtype not in dispatch.FLOATS:
            return f"needs fp32, bf16 or fp16, not {dtype}"
        return _too_large(head_dim, longest, 1, WIDEST, MOST)
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"needs a CUDA device and bf16 or fp16, not {dtype} on {device.type}"
    if missing(way):
        return f"cannot run here ({missing(way)})"
    return _too_large(head_dim, longest, 8, 256, WINDOW)


def _too_large(head_dim: int | None, longest: int | None, multiple: int, widest: int, most: int) -> str:
    if head_dim is not None and head_dim % multiple:
        return f"takes heads of a multiple of {multiple} channels, not {head_dim}"
    if head_dim is not None and head_dim > widest:
        return f"takes heads of at most {widest} channels, not {head_dim}"
    if longest is not None and longest > most:
        return f"takes sequences of at most {most} tokens, not {longest}"
    return ""


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
    """Compute softmax(q k^T / sqrt(d)) v within each sequence.

    No way waits for the device or breaks a compiled graph but xformers, whose mask is made from lists: once for each pair
    of cu_seqlens, and not where all sequences have one length. Equal lengths are known without reading them: T rows are S
    times the maximum.

    Args:
        q: (Tq, H, d), fp32, bf16 or fp16 (fp64 too in the ways sdpa and matmul).
        k, v: (Tk, H, d), in the dtype of q.
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32, the start of each sequence, then the end; sequence s of q attends to
            sequence s of k. Sequences of 2, 4 and 1 rows are [0, 2, 6, 7]. They must name every row. A sequence may have
            no queries; queries without keys get zeros.
        max_q, max_k: the longest sequence of either, or more: ints.
        way: the implementation that runs; see attention_way.

    Returns:
        (Tq, H, d), in the dtype of q.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or way; wrong cu_seqlens (CPU and debug only).
    """
    packed = PackedQKV(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    check_packed("varlen_attention", packed)
    way = attention_way(way, q.device, q.dtype, q.shape[2], max(max_q, max_k))
    if way in ("sdpa", "matmul") or not q.shape[0]:
        return dense_attention(packed, way)
    return library(way)(*packed)
