"""gather_tokens: copy the rows of a table that an index names.

    out[t] = x[idx[t]]                    dx[m] = dout[t] where idx[t] = m, else 0
    repeated rows:                        dx[m] = sum of dout[t] over idx[t] = m, in rising t, in fp32

Traffic, e bytes an element: forward 2 T D e; backward (T + M) D e plus 8 bytes a row for the inverse index, every row of
dx written once, zeros included. Repeated: the same, and 8 bytes an index to group the repeats.

An example, 4 rows of x and idx [2, 0, 2]: out is rows 2, 0, 2. `occurrences` groups the repeats: order [1, 0, 2] lists the
places of row 0 (1), then of row 2 (0 and 2); starts [0, 1, 1, 3, 3] says that row m owns order[starts[m]:starts[m + 1]],
so that dx[2] = dout[0] + dout[2], and rows 1 and 3 get zeros.
"""

import torch
from torch import Tensor

from . import dispatch
from .dispatch import jit, tl


def gather_tokens_ref(x: Tensor, idx: Tensor) -> Tensor:
    """Compute gather_tokens in plain PyTorch."""
    if x.ndim == 2:
        return x.index_select(0, idx)
    return x.flatten(0, 1).index_select(0, flat_rows(idx, x.shape[1])).view(*idx.shape, x.shape[2])


def gather_tokens_repeated_ref(x: Tensor, idx: Tensor) -> Tensor:
    """Compute gather_tokens_repeated in plain PyTorch, gradients summed in fp32."""
    gather = _GatherRepeated if torch.compiler.is_compiling() else _GatherRepeatedWithTangents
    return gather.apply(x, idx)


def flat_rows(idx: Tensor, rows: int) -> Tensor:
    """Turn (B, K) rows of each image into (B * K,) rows of the flattened (B * rows, D) table.

    Images of 4 rows, idx [[2, 0], [3, 1]]: [2, 0, 4 + 3, 4 + 1] = [2, 0, 7, 5].
    """
    return (idx + torch.arange(len(idx), device=idx.device)[:, None] * rows).flatten()


class _GatherRepeated(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, idx: Tensor) -> Tensor:
        return x.index_select(0, idx)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, idx = inputs
        ctx.rows = x.shape[0]
        ctx.save_for_backward(idx)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, None]:
        (idx,) = ctx.saved_tensors
        wide = torch.promote_types(dout.dtype, torch.float32)
        return dout.new_zeros(ctx.rows, dout.shape[1], dtype=wide).index_add(0, idx, dout.to(wide)).to(dout.dtype), None


class _GatherRepeatedWithTangents(_GatherRepeated):
    """The same for torch.func and forward-mode autograd; torch.compile traces no function that has a jvp of its own."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _GatherRepeated.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx, dx: Tensor, _) -> Tensor:
        return dx.index_select(0, *ctx.saved_tensors)


@jit(do_not_specialize=["T", "K"])
def _gather_tokens_fwd_kernel(
    x_ptr,  # (M, D)
    idx_ptr,  # (T,) int32
    out_ptr,  # (T, D)
    T,
    D,
    K,  # indices an image
    N,  # rows an image
    stride_xm,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = offs_t < T
    mask = mask_t[:, None] & (offs_d < D)[None, :]
    # Index t is of image t // K, whose rows start at t // K * N; rows are counted in 64 bits, as M * D may pass 2^31.
    row = tl.load(idx_ptr + offs_t, mask=mask_t, other=0).to(tl.int64) + offs_t // K * N
    x = tl.load(x_ptr + row[:, None] * stride_xm + offs_d[None, :], mask=mask)
    tl.store(out_ptr + offs_t[:, None] * D + offs_d[None, :], x, mask=mask)


@jit(do_not_specialize=["M"])
def _gather_tokens_repeated_bwd_kernel(
    dout_ptr,  # (T, D)
    order_ptr,  # (T,) int32: the t of each row of x, row by row, rising within a row
    starts_ptr,  # (M + 1,) int32: row m owns order[starts[m]:starts[m + 1]]
    dx_ptr,  # (M, D)
    M,
    D,
    stride_dt,
    UNROLL: tl.constexpr,  # occurrences whose loads are under way together
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_m, mask_d = offs_m < M, (offs_d < D)[None, :]
    # Rows of x side by side go through their occurrences together, as many rounds as the row that occurs most often.
    start = tl.load(starts_ptr + offs_m, mask=mask_m, other=0)
    stop = tl.load(starts_ptr + offs_m + 1, mask=mask_m, other=0)
    total = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for done in range(0, tl.max(stop - start, axis=0), UNROLL):
        for ahead in tl.static_range(UNROLL):
            place = start + done + ahead
            there = place < stop
            t = tl.load(order_ptr + place, mask=there, other=0).to(tl.int64)
            dout_row = dout_ptr + t[:, None] * stride_dt + offs_d[None, :]
            total += tl.load(dout_row, mask=there[:, None] & mask_d, other=0.0).to(tl.float32)
    dx_row = dx_ptr + offs_m[:, None] * D + offs_d[None, :]
    tl.store(dx_row, total.to(dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_d)


def take(x: Tensor, idx: Tensor, per_image: int, image_rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """Copy the rows of (M, D) that (T,) int32 names into (T, D) of `dtype`.

    Index t counts from row t // per_image * image_rows: with 2 indices and 4 rows an image, index 3 counts from row 4.
    """
    x, out = dispatch.contiguous_rows(x), x.new_empty(len(idx), x.shape[1], dtype=dtype or x.dtype)  # (T, D)
    if out.numel():
        width = dispatch.block_width(x.shape[1])
        height = max(1, 4096 // width)
        grid = (-(-len(idx) // height), -(-x.shape[1] // width))
        dispatch.launch(
            _gather_tokens_fwd_kernel, grid,
            x, idx.contiguous(), out, len(idx), x.shape[1], max(per_image, 1), image_rows, x.stride(0),
            BLOCK_T=height, BLOCK_D=width,
        )  # fmt: skip
    return out


def sum_repeats(dout: Tensor, order: Tensor, starts: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum (T, D) rows over the occurrences of each of M rows, in order, in fp32, into (M, D) of `dtype`."""
    rows, width = len(starts) - 1, dout.shape[1]
    dx = dout.new_empty(rows, width, dtype=dtype)
    if dx.numel():
        block = dispatch.block_width(width)
        height = max(1, 1024 // block)
        grid = (-(-rows // height), -(-width // block))
        dispatch.launch(
            _gather_tokens_repeated_bwd_kernel, grid,
            dout, order, starts, dx, rows, width, dout.stride(0), UNROLL=4, BLOCK_M=height, BLOCK_D=block,
        )  # fmt: skip
    return dx


def occurrences(idx: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Find where each of `rows` rows occurs in idx, without waiting for the device.

    Returns:
        order: (T,) int32, the places of row 0, then those of row 1, and so on, rising within a row.
        starts: (rows + 1,) int32, row m owns order[starts[m]:starts[m + 1]]. See the example at the top of the file.
    """
    ranked, order = torch.sort(idx, stable=True)
    starts = torch.searchsorted(ranked, torch.arange(rows + 1, dtype=idx.dtype, device=idx.device), out_int32=True)
    return order.int(), starts


@torch.library.custom_op("fastjepa_kernels::gather_tokens_fwd", mutates_args=())
def gather_tokens_fwd(x: Tensor, idx: Tensor, per_image: int, image_rows: int) -> Tensor:
    return take(x, idx, per_image, image_rows)


@gather_tokens_fwd.register_fake
def _(x, idx, per_image, image_rows):
    return x.new_empty(idx.shape[0], x.shape[1])


def _save(ctx, inputs, output):
    x, idx, ctx.per_image, ctx.image_rows = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(idx)


def _backward(ctx, dout):
    (idx,) = ctx.saved_tensors
    place = torch.ops.fastjepa_kernels.scatter_tokens_fwd  # each op is the gradient of the other
    return place(dout, idx, ctx.rows, ctx.per_image, ctx.image_rows, None, None), None, None, None


gather_tokens_fwd.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("fastjepa_kernels::gather_tokens_repeated_fwd", mutates_args=())
def gather_tokens_repeated_fwd(x: Tensor, idx: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    return take(x, idx, len(idx), 0)


@gather_tokens_repeated_fwd.register_fake
def _(x, idx, order, starts):
    return x.new_empty(idx.shape[0], x.shape[1])


@torch.library.custom_op("fastjepa_kernels::gather_tokens_repeated_bwd", mutates_args=())
def gather_tokens_repeated_bwd(dout: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    return sum_repeats(dispatch.contiguous_rows(dout), order, starts, dout.dtype)


@gather_tokens_repeated_bwd.register_fake
def _(dout, order, starts):
    return dout.new_empty(starts.shape[0] - 1, dout.shape[1])


gather_tokens_repeated_fwd.register_autograd(
    lambda ctx, dout: (gather_tokens_repeated_bwd(dout, *ctx.saved_tensors), None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[2:]),
)


dispatch.refuse_second_derivative("gather_tokens", gather_tokens_repeated_bwd)


def gather_tokens(x: Tensor, idx: Tensor) -> Tensor:
    """Copy the rows of `x` that `idx` names, each at most once; their gradient returns in one pass.

    Args:
        x: (M, D), or (B, N, D); fp32, bf16 or fp16.
        idx: int32, (T,), or (B, K) with indices into each image's N rows; no index twice (in an image).

    Returns:
        (T, D), or (B, K, D).

    Raises:
        ValueError, TypeError, IndexError: wrong shape, dtype or device; an index out of range, or there twice (CPU and debug
            only).
    """
    _check("gather_tokens", x, idx)
    dispatch.check_distinct("gather_tokens", idx, x.shape[-2], "use gather_tokens_repeated")
    if not dispatch.runs_triton("gather_tokens", x):
        return gather_tokens_ref(x, idx)
    if x.ndim == 2:
        return gather_tokens_fwd(x, idx, idx.shape[0], 0)
    return gather_tokens_fwd(x.flatten(0, 1), idx.flatten(), idx.shape[1], x.shape[1]).unflatten(0, idx.shape)


def gather_tokens_repeated(x: Tensor, idx: Tensor, repeats: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Copy the rows of `x` that `idx` names, any row any number of times; gradients of repeats are summed in a fixed order.

    Args:
        x: (M, D), fp32, bf16 or fp16.
        idx: (T,) int32.
        repeats: occurrences(idx, M) where it is known beforehand (a loader's worker can make it); else it is made here.

    Returns:
        (T, D).

    Raises:
        ValueError, TypeError, IndexError: wrong shape, dtype or device; an index out of range, or repeats of another idx (CPU
            and debug only).
    """
    if x.ndim != 2:
        raise ValueError(f"gather_tokens_repeated: x must be (M, D), not {tuple(x.shape)}; flatten it")
    _check("gather_tokens_repeated", x, idx)
    if repeats is not None:
        check_repeats("gather_tokens_repeated", idx, x.shape[0], repeats)
    if not dispatch.runs_triton("gather_tokens", x):
        return gather_tokens_repeated_ref(x, idx)
    return gather_tokens_repeated_fwd(x, idx, *(repeats or occurrences(idx, x.shape[0])))


def check_repeats(op: str, idx: Tensor, rows: int, repeats: tuple[Tensor, Tensor]) -> None:
    """Raise ValueError where `repeats` is not occurrences(idx, rows): by its shapes, and by its values where `may_read`."""
    order, starts = repeats
    if order.shape != idx.shape or starts.shape != (rows + 1,):
        raise ValueError(
            f"{op}: repeats must be occurrences(idx, {rows}), shapes {tuple(idx.shape)} and ({rows + 1},); "
            f"got {tuple(order.shape)}, {tuple(starts.shape)}"
        )
    dispatch.check_device(op, idx, order=order, starts=starts)
    if dispatch.may_read(idx) and not all(map(torch.equal, repeats, occurrences(idx, rows))):
        raise ValueError(f"{op}: repeats are those of another idx; make them by occurrences(idx, {rows})")


def _check(op: str, x: Tensor, idx: Tensor) -> None:
    if x.ndim not in (2, 3) or idx.ndim != x.ndim - 1 or (x.ndim == 3 and idx.shape[0] != x.shape[0]):
        raise ValueError(
            f"{op}: x (M, D) needs idx (T,), x (B, N, D) needs idx (B, K); got {tuple(x.shape)}, {tuple(idx.shape)}"
        )
    dispatch.check_float(op, x=x)
    dispatch.check_device(op, x, idx=idx)
    dispatch.check_idx("idx", idx, x.shape[-2])
