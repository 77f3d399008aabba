"""short_attention: attention over packed sequences of at most 256 keys and 256 queries, each on chip as a whole.

    out[i] = sum over the sequence's keys j of P[i, j] v[j],  P[i, j] = exp(q[i] . k[j] / sqrt(d) - lse[i])
    dv = P^T dout,  dP = dout v^T,  dS = P (dP - rowsum(P dP)) / sqrt(d),  dq = dS k,  dk = dS^T q

A program takes one head of one sequence. It holds a row of scores as a whole, so that softmax needs no running maximum, and
rowsum(P dP) needs neither the output nor a pass of its own. One program sums dk and dv, over its queries in order.

The tiling of an example: bf16, heads of 24, 2 sequences of 40 and 97 rows, 3 heads. `shapes` gives BLOCK_N = 128 keys (the
power of two that covers 97), BLOCK_D = 32 channels (8 of them zeros, in registers only) and BLOCK_M = 128 queries. The
forward launches 2 * 3 = 6 programs by ceil(97 / 128) = 1: program 4 is sequence 4 // 3 = 1, head 4 % 3 = 1.

Traffic, e bytes an element, Tq queries, Tk keys, H heads: forward (2 Tq + 2 Tk) H d e + 4 Tq H, backward
(3 Tq + 4 Tk) H d e + 4 Tq H: every byte once.
"""

import math

import torch
from torch import Tensor

from . import dispatch
from .dense_attention import PackedQKV, check_packed, dense_attention
from .dispatch import jit, tl

MOST = 256  # keys, or queries, of a sequence
WIDEST = 64  # a head


def short_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """Compute short_attention by padded products in bf16, by scaled_dot_product_attention else: the faster one on a CPU.

    Under torch.func it is always the products, for which torch has every derivative.
    """
    packed = PackedQKV(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    return dense_attention(packed, "matmul" if q.dtype == torch.bfloat16 or dispatch.transformed() else "sdpa")


@jit
def _short_attention_fwd_kernel(
    q_ptr,  # (Tq, H, D)
    k_ptr,  # (Tk, H, D)
    v_ptr,  # (Tk, H, D)
    cu_q_ptr,  # (S + 1,) int32
    cu_k_ptr,  # (S + 1,) int32
    out_ptr,  # (Tq, H, D)
    lse_ptr,  # (Tq, H) fp32
    H,
    scale,  # log2(e) / sqrt(D)
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    D: tl.constexpr,
    ALIGN: tl.constexpr,  # elements that divide every stride
    DOT: tl.constexpr,  # dtype of products: the inputs' own, but fp32 for bf16 in the interpreter
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys: all of the sequence
    BLOCK_D: tl.constexpr,  # channels of a head
):
    head = tl.program_id(0) % H
    sequence = tl.program_id(0) // H
    first_q, first_k = tl.load(cu_q_ptr + sequence).to(tl.int64), tl.load(cu_k_ptr + sequence).to(tl.int64)
    queries = (tl.load(cu_q_ptr + sequence + 1) - first_q).to(tl.int32)
    keys = (tl.load(cu_k_ptr + sequence + 1) - first_k).to(tl.int32)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_n, mask_d = offs_n < keys, offs_d < D
    # The compiler cannot know that strides are multiples of ALIGN: told so, it moves 16 bytes at a time.
    k_ptr += tl.multiple_of(first_k * stride_kt + head * stride_kh, ALIGN)
    v_ptr += tl.multiple_of(first_k * stride_vt + head * stride_vh, ALIGN)
    q_ptr += tl.multiple_of(first_q * stride_qt + head * stride_qh, ALIGN)
    row_k, row_v = offs_n[:, None] * stride_kt, offs_n[:, None] * stride_vt
    mask_k = mask_n[:, None] & mask_d[None, :]
    k = tl.load(k_ptr + tl.multiple_of(row_k, [ALIGN, ALIGN]) + offs_d[None, :], mask=mask_k, other=0.0).to(DOT)
    v = tl.load(v_ptr + tl.multiple_of(row_v, [ALIGN, ALIGN]) + offs_d[None, :], mask=mask_k, other=0.0).to(DOT)
    # This program's queries; those past the end of the sequence are neither read nor written.
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < queries
    mask_q = mask_m[:, None] & mask_d[None, :]
    row_q = tl.multiple_of(offs_m[:, None] * stride_qt, [ALIGN, ALIGN])
    q = tl.load(q_ptr + row_q + offs_d[None, :], mask=mask_q, other=0.0).to(DOT)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # (BLOCK_M, BLOCK_N), in powers of two
    s = tl.where(mask_n[None, :], s, -1e30)  # finite: queries without keys give 0, not NaN
    top = tl.max(s, axis=1)
    p = tl.exp2(s - top[:, None])
    total = tl.sum(p, axis=1)
    # Dividing after the product costs D divisions a query, not one a key.
    out = tl.dot(p.to(v_ptr.dtype.element_ty).to(DOT), v, input_precision=PRECISION) / total[:, None]
    row = (first_q + offs_m) * H + head
    tl.store(out_ptr + row[:, None] * D + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_q)
    tl.store(lse_ptr + row, (top + tl.log2(total)) * 0.6931471805599453, mask=mask_m)  # ln 2: stored in nats


@jit
def _short_attention_bwd_kernel(
    dout_ptr,  # (Tq, H, D)
    q_ptr,  # (Tq, H, D)
    k_ptr,  # (Tk, H, D)
    v_ptr,  # (Tk, H, D)
    lse_ptr,  # (Tq, H) fp32
    cu_q_ptr,  # (S + 1,) int32
    cu_k_ptr,  # (S + 1,) int32
    dq_ptr,  # (Tq, H, D)
    dk_ptr,  # (Tk, H, D)
    dv_ptr,  # (Tk, H, D)
    H,
    scale,  # 1 / sqrt(D)
    stride_ot,
    stride_oh,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    D: tl.constexpr,
    ALIGN: tl.constexpr,  # elements that divide every stride
    DOT: tl.constexpr,  # dtype of products: the inputs' own, but fp32 for bf16 in the interpreter
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys: all of the sequence
    BLOCK_D: tl.constexpr,  # channels of a head
):
    head = tl.program_id(0) % H
    sequence = tl.program_id(0) // H
    first_q, first_k = tl.load(cu_q_ptr + sequence).to(tl.int64), tl.load(cu_k_ptr + sequence).to(tl.int64)
    queries = (tl.load(cu_q_ptr + sequence + 1) - first_q).to(tl.int32)
    keys = (tl.load(cu_k_ptr + sequence + 1) - first_k).to(tl.int32)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_n, mask_d = offs_n < keys, offs_d < D
    # The compiler cannot know that strides are multiples of ALIGN: told so, it moves 16 bytes at a time.
    k_ptr += tl.multiple_of(first_k * stride_kt + head * stride_kh, ALIGN)
    v_ptr += tl.multiple_of(first_k * stride_vt + head * stride_vh, ALIGN)
    q_ptr += tl.multiple_of(first_q * stride_qt + head * stride_qh, ALIGN)
    dout_ptr += tl.multiple_of(first_q * stride_ot + head * stride_oh, ALIGN)
    row_k, row_v = offs_n[:, None] * stride_kt, offs_n[:, None] * stride_vt
    mask_k = mask_n[:, None] & mask_d[None, :]
    k = tl.load(k_ptr + tl.multiple_of(row_k, [ALIGN, ALIGN]) + offs_d[None, :], mask=mask_k, other=0.0).to(DOT)
    v = tl.load(v_ptr + tl.multiple_of(row_v, [ALIGN, ALIGN]) + offs_d[None, :], mask=mask_k, other=0.0).to(DOT)
    # Keys and values stay; the loop brings the queries past them, and dk and dv are summed in registers.
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for start in tl.range(0, queries, BLOCK_M, disable_licm=True):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < queries
        mask_q = mask_m[:, None] & mask_d[None, :]
        row_q = tl.multiple_of(offs_m[:, None] * stride_qt, [ALIGN, ALIGN])
        row_o = tl.multiple_of(offs_m[:, None] * stride_ot, [ALIGN, ALIGN])
        q = tl.load(q_ptr + row_q + offs_d[None, :], mask=mask_q, other=0.0).to(DOT)
        dout = tl.load(dout_ptr + row_o + offs_d[None, :], mask=mask_q, other=0.0).to(DOT)
        row = (first_q + offs_m) * H + head
        lse = tl.load(lse_ptr + row, mask=mask_m, other=0.0) * 1.4426950408889634
        # Scores are (BLOCK_N, BLOCK_M), keys down, queries across: dv and dk take P and dS as they lie in registers.
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * 1.4426950408889634) - lse[None, :]
        p = tl.exp2(tl.where(mask_n[:, None], s, -1e30))
        dv += tl.dot(p.to(v_ptr.dtype.element_ty).to(DOT), dout, input_precision=PRECISION)
        # dS = P (dP - rowsum(P dP)); its row is a column here, and whole, as every key of the sequence is.
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        ds = (p * (dp - tl.sum(p * dp, axis=0)[None, :])).to(k_ptr.dtype.element_ty).to(DOT)
        dk += tl.dot(ds, q, input_precision=PRECISION)
        dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION) * scale
        tl.store(dq_ptr + row[:, None] * D + offs_d[None, :], dq.to(dq_ptr.dtype.element_ty), mask=mask_q)
    place = ((first_k + offs_n) * H + head)[:, None] * D + offs_d[None, :]
    tl.store(dk_ptr + place, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask_k)
    tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), mask=mask_k)


def blocks(most: int, cap: int) -> int:
    """Return the power of two from 16 to `cap` that covers a sequence: 5 gives 16, 17 gives 32, 97 gives 128."""
    return min(max(16, 1 << (most - 1).bit_length()), cap)


def shapes(q: Tensor, max_q: int, max_k: int, backward: bool) -> dict[str, int]:
    """Return how many queries, keys and channels a program holds at a time, and its warps.

    Keys are all there, so that queries must give way: the most that leaves no spills. In bf16 with heads of 24, 40 keys
    hold 64 queries (4 warps), 97 keys 128 (8 warps), 200 keys 64 (4 warps); the backward, which also holds dk and dv, 32.
    """
    wide, keys, width = q.dtype == torch.float32, blocks(max_k, MOST), blocks(q.shape[2], WIDEST)
    if wide:  # exact products are made outside the tensor cores, from registers
        queries, warps = 16, 16 if backward and keys * width >= 128 * WIDEST else 8
    elif backward:
        queries, warps = blocks(max_q, 32), 4 if keys <= 64 else 8
    elif keys == MOST:
        queries, warps = (blocks(max_q, 64), 4) if width <= 32 else (blocks(max_q, 32), 8)
    else:
        queries = blocks(max_q, 64 if keys <= 64 else 128)
        warps = 8 if queries == 128 else 4
    return {"BLOCK_M": queries, "BLOCK_N": keys, "BLOCK_D": width, "num_warps": warps, "num_stages": 1}


def common(*tensors: Tensor) -> int:
    """Return how many elements, at most 16 bytes of them, divide every stride and the width of a head.

    bf16 slices of (T, 3, 16, 24): strides 1152 and 24, heads of 24: 8 elements, 16 bytes. Heads of 20: 4 elements.
    """
    strides = [stride for x in tensors for stride in x.stride()[:2]]
    return math.gcd(*strides, tensors[0].shape[2], 16 // tensors[0].element_size())


def dot_dtype(x: Tensor):
    """Return Triton's dtype for x; Triton's interpreter multiplies the bits of bf16 as integers, so fp32 there."""
    return tl.float32 if dispatch.INTERPRETED and x.dtype == torch.bfloat16 else getattr(tl, str(x.dtype).rpartition(".")[2])


@torch.library.custom_op("fastjepa_kernels::short_attention_fwd", mutates_args=())
def short_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int
) -> tuple[Tensor, Tensor]:
    """Return out (Tq, H, d) and, for the backward, lse (Tq, H) fp32, the logarithm of each query's sum."""
    q, k, v = dispatch.contiguous_rows(q), dispatch.contiguous_rows(k), dispatch.contiguous_rows(v)
    (rows, heads, width), sequences = q.shape, len(cu_seqlens_q) - 1
    out, lse = q.new_empty(q.shape), q.new_empty(rows, heads, dtype=torch.float32)
    if out.numel():
        chosen = shapes(q, max_q, max_k, backward=False)
        dispatch.launch(
            _short_attention_fwd_kernel, (sequences * heads, -(-max_q // chosen["BLOCK_M"])),
            q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, heads, math.log2(math.e) * width**-0.5,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            D=width, ALIGN=common(q, k, v), DOT=dot_dtype(q), PRECISION="ieee", **chosen,
        )  # fmt: skip
    return out, lse


@short_attention_fwd.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k):
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[1], dtype=torch.float32)


@torch.library.custom_op("fastjepa_kernels::short_attention_bwd", mutates_args=())
def short_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq (Tq, H, d), dk and dv (Tk, H, d)."""
    dout, q, k, v = (dispatch.contiguous_rows(x) for x in (dout, q, k, v))
    heads, width, sequences = q.shape[1], q.shape[2], len(cu_seqlens_q) - 1
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if dq.numel() or dk.numel():
        dispatch.launch(
            _short_attention_bwd_kernel, (sequences * heads,),
            dout, q, k, v, lse, cu_seqlens_q, cu_seqlens_k, dq, dk, dv, heads, width**-0.5,
            dout.stride(0), dout.stride(1), q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            D=width, ALIGN=common(dout, q, k, v), DOT=dot_dtype(q), PRECISION="ieee", **shapes(q, max_q, max_k, backward=True),
        )  # fmt: skip
    return dq, dk, dv


@short_attention_bwd.register_fake
def _(dout, q, k, v, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, ctx.max_q, ctx.max_k = inputs
    ctx.save_for_backward(q, k, v, output[1], cu_seqlens_q, cu_seqlens_k)


def _backward(ctx, dout, _dlse):
    return *short_attention_bwd(dout, *ctx.saved_tensors, ctx.max_q, ctx.max_k), None, None, None, None


short_attention_fwd.register_autograd(_backward, setup_context=_save)


dispatch.refuse_second_derivative("short_attention", short_attention_bwd, remedy='varlen_attention by "matmul" has one')


def short_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v within each sequence, for sequences of at most 256 keys and 256 queries.

    Args:
        q: (Tq, H, d), d at most 64; fp32, bf16 or fp16; a slice of a packed (Tq, 3, H, d) is read where it lies.
        k, v: (Tk, H, d), in the dtype of q.
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32, the start of each sequence, then the end; sequence s of q attends to
            sequence s of k. They must name every row. A sequence may have no queries; queries without keys get zeros.
        max_q, max_k: the longest sequence of either, or more: ints, so that nothing waits for the device.

    Returns:
        (Tq, H, d), in the dtype of q; products of fp32 are exact (no TF32), sums are made in fp32.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or length; wrong cu_seqlens (CPU and debug only).
    """
    check_packed("short_attention", PackedQKV(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k))
    dispatch.check_float("short_attention", q=q, k=k, v=v)
    if q.shape[2] > WIDEST:
        raise ValueError(f"short_attention: heads of {q.shape[2]} are wider than {WIDEST}; use another way of varlen_attention")
    if max(max_q, max_k) > MOST:
        raise ValueError(
            f"short_attention: max_q {max_q} and max_k {max_k} must be at most {MOST}; use another way of varlen_attention"
        )
    if not dispatch.runs_triton("short_attention", q):
        return short_attention_ref(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    return short_attention_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k)[0]
