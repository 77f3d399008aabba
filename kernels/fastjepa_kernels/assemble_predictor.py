"""assemble_predictor: make the packed input of I-JEPA's predictor, and the layout of its sequences.

    out[l] = context[idx[l]] + positions[context_idx[idx[l]]]        where idx[l] < T
             mask_token + positions[idx[l] - T]                      elsewhere
    dcontext[t] = sum of dout[l] over idx[l] = t, in rising l        dmask_token = sum of dout[l] over idx[l] >= T

Every context row is there once for each target block. Sums are made in fp32, in an order that does not vary.

Traffic, e bytes an element: forward 2 L P e and 4 bytes an index, positions re-read from L2; backward L P e read, T P e
written, and 8 bytes an index to group the repeats: dcontext reads the rows of contexts, dmask_token all others, none twice.

An example of the layout, 2 images, 1 context mask, 1 target block an image. Contexts have 2 and 1 rows (T = 3), starts
[0, 2, 3]; target blocks lie at positions [5, 6] and [4], starts [0, 2, 3]. Each sequence is a context, then its block:

    sequence 0   context rows 0, 1   mask tokens at 5, 6        idx [0, 1, 8, 9]    (T + 5 = 8)
    sequence 1   context row  2      mask token  at 4           idx [2, 7]
    idx [0, 1, 8, 9, 2, 7], cu_seqlens [0, 4, 6]
"""

import torch
from torch import Tensor

from . import dispatch
from .dispatch import jit, tl
from .gather_tokens import check_repeats, gather_tokens_repeated_ref, occurrences, sum_repeats

SUM_ROWS = 256  # rows whose share of dmask_token one program sums


def predictor_layout(
    context_cu_seqlens: Tensor, target_idx: Tensor, target_cu_seqlens: Tensor, images: int, context_rows: int
) -> tuple[Tensor, Tensor]:
    """Lay out the predictor's sequences: one for each target block, context mask and image, the last fastest.

    A sequence is the rows of its context, then those of its block; the file begins with an example. Plain torch, on any
    device, without waiting for it: the number of rows is known from the arguments.

    Args:
        context_cu_seqlens: (K * images + 1,) int32, the start of each context, then the end: K masks, mask major.
        target_idx: (U,) int32, the position in its image of each row of the target blocks.
        target_cu_seqlens: (R * images + 1,) int32, the start of each block, then the end: R blocks an image, block major.
        images: b.
        context_rows: T, the last value of context_cu_seqlens.

    Returns:
        idx: (R * T + K * U,) int32, the content of each row: below T that context row, else T + position.
        cu_seqlens: (R * K * images + 1,) int32.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device; starts that fall or end elsewhere (CPU and debug only).
    """
    _check_layout(context_cu_seqlens, target_idx, target_cu_seqlens, images, context_rows)
    masks, blocks = ((len(starts) - 1) // max(images, 1) for starts in (context_cu_seqlens, target_cu_seqlens))
    # The content of every row that a sequence can be made of: context rows 0 to T - 1, then T + position of the blocks.
    table = torch.cat((torch.arange(context_rows, dtype=torch.int32, device=target_idx.device), target_idx + context_rows))

    def pieces(of_contexts: Tensor, of_blocks: Tensor) -> Tensor:
        """Repeat (K * b,) and (R * b,) into (R * K * b * 2,): for each sequence its context's value, then its block's."""
        pair = of_contexts.view(1, masks, images), of_blocks.view(blocks, 1, images)
        return torch.stack([part.expand(blocks, masks, images) for part in pair], dim=-1).flatten()

    # Two pieces a sequence. In the example: lengths [2, 2, 1, 1], ends [2, 4, 5, 6], so they start at [0, 2, 4, 5] in idx,
    # and at [0, 3, 2, 5] in the table; the shift between the two is [0, 1, -2, 0].
    lengths = pieces(context_cu_seqlens.diff(), target_cu_seqlens.diff())
    ends = lengths.cumsum(0, dtype=torch.int32)
    shift = pieces(context_cu_seqlens[:-1], target_cu_seqlens[:-1] + context_rows) - (ends - lengths)
    total = blocks * context_rows + masks * len(target_idx)
    source = torch.repeat_interleave(shift, lengths, output_size=total)
    source = source + torch.arange(total, dtype=torch.int32, device=source.device)
    return table.index_select(0, source), torch.cat((ends.new_zeros(1), ends[1::2]))


def assemble_predictor_ref(
    context: Tensor,
    context_idx: Tensor,
    positions: Tensor,
    mask_token: Tensor,
    idx: Tensor,
    repeats: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute assemble_predictor in plain PyTorch: every distinct row is made once, then repeated."""
    seen = context + positions.index_select(0, context_idx)  # (T, P)
    masked = (positions.to(seen.dtype) + mask_token).to(seen.dtype)  # (N, P)
    return gather_tokens_repeated_ref(torch.cat((seen, masked)), idx)


@jit(do_not_specialize=["L", "T"])
def _assemble_predictor_fwd_kernel(
    context_ptr,  # (T, P)
    context_idx_ptr,  # (T,) int32
    positions_ptr,  # (N, P)
    mask_token_ptr,  # (P,)
    idx_ptr,  # (L,) int32
    out_ptr,  # (L, P)
    L,
    P,
    T,
    stride_ct,
    stride_pn,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    offs_l = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_l, mask_p = offs_l < L, offs_p < P
    mask = mask_l[:, None] & mask_p[None, :]
    row = tl.load(idx_ptr + offs_l, mask=mask_l, other=0).to(tl.int64)
    # Below T the row is a context row, whose position context_idx knows; from T on it is a mask token at position row - T.
    seen = row < T
    position = tl.load(context_idx_ptr + row, mask=mask_l & seen, other=0).to(tl.int64)
    position = tl.where(seen, position, row - T)
    context = tl.load(context_ptr + row[:, None] * stride_ct + offs_p[None, :], mask=mask & seen[:, None], other=0.0)
    mask_token = tl.load(mask_token_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)
    out = tl.load(positions_ptr + position[:, None] * stride_pn + offs_p[None, :], mask=mask, other=0.0).to(tl.float32)
    out += tl.where(seen[:, None], context.to(tl.float32), mask_token[None, :])
    tl.store(out_ptr + offs_l[:, None] * P + offs_p[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["L", "T"])
def _assemble_predictor_dmask_kernel(
    dout_ptr,  # (L, P)
    idx_ptr,  # (L,) int32
    partial_ptr,  # (programs, P) fp32
    L,
    P,
    T,
    stride_dl,
    ROWS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    total = tl.zeros([BLOCK_L, BLOCK_P], dtype=tl.float32)
    # Context rows are masked, so that their gradient is not read here: dcontext reads it.
    for start in range(0, ROWS, BLOCK_L):
        offs_l = first + start + tl.arange(0, BLOCK_L)
        masked = tl.load(idx_ptr + offs_l, mask=offs_l < L, other=-1) >= T
        mask = masked[:, None] & mask_p[None, :]
        total += tl.load(dout_ptr + offs_l[:, None] * stride_dl + offs_p[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * P + offs_p, tl.sum(total, axis=0), mask=mask_p)


@torch.library.custom_op("fastjepa_kernels::assemble_predictor_fwd", mutates_args=())
def assemble_predictor_fwd(
    context: Tensor,
    context_idx: Tensor,
    positions: Tensor,
    mask_token: Tensor,
    idx: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
) -> Tensor:
    context, positions = dispatch.contiguous_rows(context), dispatch.contiguous_rows(positions)
    length, width = len(idx), context.shape[1]
    out = context.new_empty(length, width, dtype=torch.promote_types(context.dtype, positions.dtype))
    if out.numel():
        block = dispatch.block_width(width)
        height = max(1, 4096 // block)
        dispatch.launch(
            _assemble_predictor_fwd_kernel, (-(-length // height), -(-width // block)),
            context, context_idx.contiguous(), positions, mask_token.contiguous(), idx.contiguous(), out,
            length, width, len(context), context.stride(0), positions.stride(0), BLOCK_L=height, BLOCK_P=block,
        )  # fmt: skip
    return out


@assemble_predictor_fwd.register_fake
def _(context, context_idx, positions, mask_token, idx, order, starts):
    dtype = torch.promote_types(context.dtype, positions.dtype)
    return context.new_empty(idx.shape[0], context.shape[1], dtype=dtype)


@torch.library.custom_op("fastjepa_kernels::assemble_predictor_dcontext", mutates_args=())
def assemble_predictor_dcontext(dout: Tensor, order: Tensor, starts: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Sum (L, P) over each context row's repeats into (rows, P) of `dtype`."""
    return sum_repeats(dispatch.contiguous_rows(dout), order, starts[: rows + 1], dtype)


@assemble_predictor_dcontext.register_fake
def _(dout, order, starts, rows, dtype):
    return dout.new_empty(rows, dout.shape[1], dtype=dtype)


@torch.library.custom_op("fastjepa_kernels::assemble_predictor_dmask", mutates_args=())
def assemble_predictor_dmask(dout: Tensor, idx: Tensor, rows: int) -> Tensor:
    """Sum (L, P) over the rows that are no context row into (P,) fp32, in two fixed stages: 256 rows a program, then those."""
    dout = dispatch.contiguous_rows(dout)
    length, width = dout.shape
    partial = dout.new_empty(-(-length // SUM_ROWS), width, dtype=torch.float32)  # (programs, P)
    if partial.numel():
        block = dispatch.block_width(width, 256)
        dispatch.launch(
            _assemble_predictor_dmask_kernel, (len(partial), -(-width // block)),
            dout, idx.contiguous(), partial, length, width, rows, dout.stride(0),
            ROWS=SUM_ROWS, BLOCK_L=16, BLOCK_P=block, num_warps=8,
        )  # fmt: skip
    return partial.sum(dim=0)


@assemble_predictor_dmask.register_fake
def _(dout, idx, rows):
    return dout.new_empty(dout.shape[1], dtype=torch.float32)


def _save(ctx, inputs, output):
    context, _, _, mask_token, idx, order, starts = inputs
    ctx.rows, ctx.context_dtype, ctx.mask_dtype = context.shape[0], context.dtype, mask_token.dtype
    ctx.save_for_backward(idx, order, starts)


def _backward(ctx, dout):
    idx, order, starts = ctx.saved_tensors
    dcontext = dmask_token = None
    if ctx.needs_input_grad[0]:
        order, starts = (order, starts) if order is not None else occurrences(idx, ctx.rows)
        dcontext = assemble_predictor_dcontext(dout, order, starts, ctx.rows, ctx.context_dtype)
    if ctx.needs_input_grad[3]:
        dmask_token = assemble_predictor_dmask(dout, idx, ctx.rows).to(ctx.mask_dtype)
    return dcontext, None, None, dmask_token, None, None, None


assemble_predictor_fwd.register_autograd(_backward, setup_context=_save)


dispatch.refuse_second_derivative("assemble_predictor", assemble_predictor_dcontext, assemble_predictor_dmask)


def assemble_predictor(
    context: Tensor,
    context_idx: Tensor,
    positions: Tensor,
    mask_token: Tensor,
    idx: Tensor,
    repeats: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Make the rows of the predictor's sequences: context rows and mask tokens, each with its position (paper, section 3).

    Args:
        context: (T, P), the context encoder's features in the predictor's width; fp32, bf16 or fp16.
        context_idx: (T,) int32, the position of each context row in its image.
        positions: (N, P), any of the dtypes. A constant: it has no gradient.
        mask_token: (P,), any of the dtypes.
        idx: (L,) int32, below T that context row, T + n a mask token at position n: predictor_layout makes it.
        repeats: occurrences(idx, T + N) where it is known beforehand (a loader's worker can make it); else the backward
            makes them.

    Returns:
        (L, P), in the dtype that context and positions promote to; sums are made in fp32.

    Raises:
        ValueError, TypeError, IndexError: wrong shape, dtype or device; an index out of range, or repeats of another idx (CPU
            and debug only).
    """
    _check(context, context_idx, positions, mask_token, idx, repeats)
    if not dispatch.runs_triton("assemble_predictor", context):
        return assemble_predictor_ref(context, context_idx, positions, mask_token, idx)
    return assemble_predictor_fwd(context, context_idx, positions, mask_token, idx, *(repeats or (None, None)))


def _check(context, context_idx, positions, mask_token, idx, repeats) -> None:
    op = "assemble_predictor"
    given = {"context_idx": context_idx, "positions": positions, "mask_token": mask_token, "idx": idx}
    if context.ndim != 2 or context_idx.shape != context.shape[:1]:
        raise ValueError(f"{op}: context (T, P) needs context_idx (T,); got {tuple(context.shape)}, {tuple(context_idx.shape)}")
    width = context.shape[1]
    if positions.ndim != 2 or positions.shape[1] != width:
        raise ValueError(f"{op}: positions must be (N, {width}), not {tuple(positions.shape)}")
    if mask_token.shape != (width,):
        raise ValueError(f"{op}: mask_token must be ({width},), not {tuple(mask_token.shape)}; flatten it")
    if idx.ndim != 1:
        raise ValueError(f"{op}: idx must be (L,), not {tuple(idx.shape)}; flatten it")
    if positions.requires_grad:
        raise ValueError(f"{op}: positions have no gradient; detach them, or add learned ones after")
    rows = len(context) + len(positions)
    dispatch.check_float(op, context=context, positions=positions, mask_token=mask_token)
    dispatch.check_device(op, context, **given)
    dispatch.check_idx("context_idx", context_idx, len(positions))
    dispatch.check_idx("idx", idx, rows)
    if repeats is not None:
        check_repeats(op, idx, rows, repeats)


def _check_layout(context_cu_seqlens, target_idx, target_cu_seqlens, images: int, context_rows: int) -> None:
    op = "predictor_layout"
    given = {"context_cu_seqlens": context_cu_seqlens, "target_idx": target_idx, "target_cu_seqlens": target_cu_seqlens}
    for name, tensor in given.items():
        if tensor.dtype != torch.int32:
            raise TypeError(f"{op}: {name} must be int32, not {tensor.dtype}; .int() converts it")
        if tensor.ndim != 1:
            raise ValueError(f"{op}: {name} must be flat, not {tuple(tensor.shape)}; flatten it")
    dispatch.check_device(op, context_cu_seqlens, target_idx=target_idx, target_cu_seqlens=target_cu_seqlens)
    for name, rows in (("context_cu_seqlens", context_rows), ("target_cu_seqlens", len(target_idx))):
        starts = given[name]
        sequences = len(starts) - 1
        if sequences < 0 or sequences % images if images else sequences:
            raise ValueError(f"{op}: {name} must have n * {images} + 1 values for {images} images, not {len(starts)}")
        if torch.compiler.is_compiling() or starts.is_meta or not (dispatch.DEBUG or starts.device.type == "cpu"):
            continue
        first, last = int(starts[0]), int(starts[-1])
        if first != 0 or last != rows or bool((starts.diff() < 0).any()):
            raise ValueError(f"{op}: {name} must rise from 0 to {rows}, the rows it divides; it goes from {first} to {last}")
