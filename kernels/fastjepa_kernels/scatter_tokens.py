"""scatter_tokens: put rows where an index says, fill every other row, add positions: MAE's un-shuffle in one pass.

    out[m] = (x[t] where idx[t] = m, else fill) + positions[m % N]
    dx[t] = dout[idx[t]]                  dfill = sum of dout[m] over the rows that idx does not name

The result has the dtype of x + positions, and fill is rounded to it first; the sum is made in fp32 and rounded once.

Traffic, e bytes an element: forward (T + M) D e plus 8 bytes a row for the inverse index; backward 2 T D e, and the M - T
filled rows once for dfill. Positions are re-read from L2. Where the dtypes differ each side moves its own bytes, once.

An example, idx [3, 0] and 5 rows: the inverse index is [1, -1, -1, 0, -1]. Row 0 takes x[1], row 3 takes x[0], and the rows
of -1 take fill. Writing by the inverse writes each row once, in order; writing by idx would first have to fill them all.
"""

import torch
from torch import Tensor

from . import dispatch
from .dispatch import jit, tl
from .gather_tokens import flat_rows, take

SUM_ROWS = 256  # rows whose dfill one program sums


def scatter_tokens_ref(
    x: Tensor, idx: Tensor, num_rows: int, fill: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """Compute scatter_tokens in plain PyTorch."""
    rows = idx if x.ndim == 2 else flat_rows(idx, num_rows)
    total = num_rows if x.ndim == 2 else x.shape[0] * num_rows
    width, dtype = x.shape[-1], result_dtype(x, positions)
    blank = x.new_zeros(total, width, dtype=dtype) if fill is None else fill.to(dtype).expand(total, width)  # (M, D)
    out = blank.index_copy(0, rows.long(), x.reshape(len(rows), width).to(dtype))
    if positions is not None:
        out = out.view(total // len(positions), *positions.shape) + positions
    return out.view(*x.shape[:-2], num_rows, width)


def result_dtype(x: Tensor, positions: Tensor | None) -> torch.dtype:
    """Return the dtype of x + positions."""
    return x.dtype if positions is None else torch.promote_types(x.dtype, positions.dtype)


@jit(do_not_specialize=["T", "K"])
def _invert_kernel(
    idx_ptr,  # (T,) int32
    inverse_ptr,  # (M,) int32, -1 everywhere
    T,
    K,  # indices an image
    N,  # rows an image
    BLOCK_T: tl.constexpr,
):
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    # Index t is of image t // K, whose rows start at t // K * N.
    row = tl.load(idx_ptr + offs_t, mask=mask_t, other=0).to(tl.int64) + offs_t // K * N
    tl.store(inverse_ptr + row, offs_t.to(tl.int32), mask=mask_t)


@jit(do_not_specialize=["M", "N"])
def _scatter_tokens_fwd_kernel(
    x_ptr,  # (T, D)
    inverse_ptr,  # (M,) int32: the t of each row, or -1
    fill_ptr,  # (D,), or anything
    positions_ptr,  # (N, D), or anything
    out_ptr,  # (M, D), the dtype of x + positions
    M,
    D,
    N,  # rows of the position table
    stride_xt,
    HAS_FILL: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_m, mask_d = offs_m < M, offs_d < D
    mask = mask_m[:, None] & mask_d[None, :]
    t = tl.load(inverse_ptr + offs_m, mask=mask_m, other=-1).to(tl.int64)
    placed = (t >= 0)[:, None]
    row = tl.load(x_ptr + t[:, None] * stride_xt + offs_d[None, :], mask=mask & placed, other=0.0)
    # Rows that are only moved keep their bits; what is filled or added goes through fp32.
    if HAS_FILL or HAS_POSITIONS:
        row = row.to(tl.float32)
    if HAS_FILL:
        fill = tl.load(fill_ptr + offs_d, mask=mask_d, other=0.0).to(out_ptr.dtype.element_ty).to(tl.float32)
        row = tl.where(placed, row, fill[None, :])
    if HAS_POSITIONS:
        row += tl.load(positions_ptr + (offs_m % N)[:, None] * D + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_m[:, None] * D + offs_d[None, :], row.to(out_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["M"])
def _scatter_tokens_dfill_kernel(
    dout_ptr,  # (M, D)
    inverse_ptr,  # (M,) int32
    partial_ptr,  # (programs, D) fp32
    M,
    D,
    stride_dm,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    total = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # Rows that idx names are masked, so that their gradient is not even read.
    for start in range(0, ROWS, BLOCK_M):
        offs_m = first + start + tl.arange(0, BLOCK_M)
        filled = tl.load(inverse_ptr + offs_m, mask=offs_m < M, other=0) < 0
        mask = filled[:, None] & mask_d[None, :]
        total += tl.load(dout_ptr + offs_m[:, None] * stride_dm + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + offs_d, tl.sum(total, axis=0), mask=mask_d)


def invert(idx: Tensor, rows: int, per_image: int, image_rows: int) -> Tensor:
    """Return (rows,) int32: the place in (T,) idx that names each row, or -1."""
    inverse = torch.full((rows,), -1, dtype=torch.int32, device=idx.device)  # (M,)
    if len(idx):
        grid = (-(-len(idx) // 1024),)
        dispatch.launch(_invert_kernel, grid, idx.contiguous(), inverse, len(idx), max(per_image, 1), image_rows, BLOCK_T=1024)
    return inverse


@torch.library.custom_op("fastjepa_kernels::scatter_tokens_fwd", mutates_args=())
def scatter_tokens_fwd(
    x: Tensor, idx: Tensor, rows: int, per_image: int, image_rows: int, fill: Tensor | None, positions: Tensor | None
) -> Tensor:
    """Return (rows, D) with x (T, D) at the rows that idx names; per_image indices count from rows image_rows apart."""
    x = dispatch.contiguous_rows(x)
    width = x.shape[1]
    out = x.new_empty(rows, width, dtype=result_dtype(x, positions))
    if out.numel():
        block = dispatch.block_width(width)
        height = max(1, 4096 // block)
        inverse = invert(idx, rows, per_image, image_rows)
        dispatch.launch(
            _scatter_tokens_fwd_kernel, (-(-rows // height), -(-width // block)),
            x, inverse, x if fill is None else fill.contiguous(), x if positions is None else positions.contiguous(), out,
            rows, width, 1 if positions is None else len(positions), x.stride(0),
            HAS_FILL=fill is not None, HAS_POSITIONS=positions is not None, BLOCK_M=height, BLOCK_D=block,
        )  # fmt: skip
    return out


@scatter_tokens_fwd.register_fake
def _(x, idx, rows, per_image, image_rows, fill, positions):
    return x.new_empty(rows, x.shape[1], dtype=result_dtype(x, positions))


@torch.library.custom_op("fastjepa_kernels::scatter_tokens_dx", mutates_args=())
def scatter_tokens_dx(dout: Tensor, idx: Tensor, per_image: int, image_rows: int, dtype: torch.dtype) -> Tensor:
    """Gather (M, D) into (T, D) of `dtype`, narrowed in the same pass."""
    return take(dout, idx, per_image, image_rows, dtype)


@scatter_tokens_dx.register_fake
def _(dout, idx, per_image, image_rows, dtype):
    return dout.new_empty(idx.shape[0], dout.shape[1], dtype=dtype)


@torch.library.custom_op("fastjepa_kernels::scatter_tokens_dfill", mutates_args=())
def scatter_tokens_dfill(dout: Tensor, idx: Tensor, per_image: int, image_rows: int) -> Tensor:
    """Sum (M, D) into (D,) fp32 over the rows that idx does not name, in two fixed stages: 256 rows a program, then those."""
    dout = dispatch.contiguous_rows(dout)
    rows, width = dout.shape
    partial = dout.new_empty(-(-rows // SUM_ROWS), width, dtype=torch.float32)  # (programs, D)
    if partial.numel():
        block = dispatch.block_width(width, 256)
        inverse = invert(idx, rows, per_image, image_rows)
        dispatch.launch(
            _scatter_tokens_dfill_kernel, (len(partial), -(-width // block)),
            dout, inverse, partial, rows, width, dout.stride(0), ROWS=SUM_ROWS, BLOCK_M=16, BLOCK_D=block,
        )  # fmt: skip
    return partial.sum(dim=0)


@scatter_tokens_dfill.register_fake
def _(dout, idx, per_image, image_rows):
    return dout.new_empty(dout.shape[1], dtype=torch.float32)


def _save(ctx, inputs, output):
    x, idx, _, ctx.per_image, ctx.image_rows, fill, _ = inputs
    ctx.x_dtype, ctx.fill_dtype = x.dtype, None if fill is None else fill.dtype
    ctx.save_for_backward(idx)


def _backward(ctx, dout):
    (idx,) = ctx.saved_tensors
    dx = dfill = None
    if ctx.needs_input_grad[0]:
        dx = scatter_tokens_dx(dout, idx, ctx.per_image, ctx.image_rows, ctx.x_dtype)
    if ctx.needs_input_grad[5]:
        dfill = scatter_tokens_dfill(dout, idx, ctx.per_image, ctx.image_rows).to(ctx.fill_dtype)
    return dx, None, None, None, None, dfill, None


scatter_tokens_fwd.register_autograd(_backward, setup_context=_save)


dispatch.refuse_second_derivative("scatter_tokens", scatter_tokens_dx, scatter_tokens_dfill)


def scatter_tokens(
    x: Tensor, idx: Tensor, num_rows: int, fill: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """Put rows where `idx` says; every other row is zero or `fill`; add `positions` to all.

    Args:
        x: (T, D), or (B, K, D); fp32, bf16 or fp16.
        idx: int32, (T,), or (B, K) with places among each image's num_rows; no place twice (in an image).
        num_rows: rows of the result (of an image).
        fill: (D,), any of the dtypes, rounded to the result's: a mask token.
        positions: (N, D), any of the dtypes, N dividing num_rows; row m gets positions[m % N]. A constant without gradient.

    Returns:
        (num_rows, D), or (B, num_rows, D), in the dtype of x + positions, or of x where there are none; sums are made in
        fp32. The gradients have the dtypes of x and fill.

    Raises:
        ValueError, TypeError, IndexError: wrong shape, dtype or device; an index out of range, or there twice (CPU and debug
            only).
    """
    _check(x, idx, num_rows, fill, positions)
    if not dispatch.runs_triton("scatter_tokens", x):
        return scatter_tokens_ref(x, idx, num_rows, fill, positions)
    if x.ndim == 2:
        return scatter_tokens_fwd(x, idx, num_rows, idx.shape[0], 0, fill, positions)
    flat = scatter_tokens_fwd(x.flatten(0, 1), idx.flatten(), len(x) * num_rows, idx.shape[1], num_rows, fill, positions)
    return flat.unflatten(0, (len(x), num_rows))


def _check(x: Tensor, idx: Tensor, num_rows: int, fill: Tensor | None, positions: Tensor | None) -> None:
    if x.ndim not in (2, 3) or idx.shape != x.shape[:-1]:
        raise ValueError(
            f"scatter_tokens: x (T, D) needs idx (T,), x (B, K, D) needs idx (B, K); got {tuple(x.shape)}, {tuple(idx.shape)}"
        )
    width = x.shape[-1]
    if fill is not None and fill.shape != (width,):
        raise ValueError(f"scatter_tokens: fill must be ({width},), not {tuple(fill.shape)}")
    if num_rows < 0:
        raise ValueError(f"scatter_tokens: num_rows must not be negative, not {num_rows}")
    if positions is not None and (
        positions.ndim != 2 or positions.shape[1] != width or not len(positions) or num_rows % len(positions)
    ):
        raise ValueError(
            f"scatter_tokens: positions must be (N, {width}) with N dividing {num_rows}, not {tuple(positions.shape)}"
        )
    if positions is not None and positions.requires_grad:
        raise ValueError("scatter_tokens: positions have no gradient; detach them, or add learned ones after")
    given = {name: tensor for name, tensor in (("fill", fill), ("positions", positions)) if tensor is not None}
    dispatch.check_float("scatter_tokens", x=x, **given)
    dispatch.check_device("scatter_tokens", x, idx=idx, **given)
    dispatch.check_idx("idx", idx, num_rows)
    dispatch.check_distinct("scatter_tokens", idx, num_rows, "give each place once")
