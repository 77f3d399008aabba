"""target_loss: compute I-JEPA's loss between predicted rows and layer-normalised target features, with its gradient.

    y[q] = layer_norm(features[idx[q]])                  over D, without affine, eps 1e-5
    loss = sum of weight[q] * distance(prediction[q], y[q])
    distance = mean over D of smooth_l1 (beta 1), or of the squared error; or 1 - cos, as torch's cosine_similarity

All in fp32, whatever the dtypes. The forward also writes the gradient, in the same pass over the data, without its factor
weight / D: that is below the smallest number of fp16 before a loss scale can multiply it. An example: 20,000 rows of D =
1280, each of weight 1 / 20000, error 0.5. The gradient is 0.5 / 20000 / 1280 = 2e-8, and fp16 has nothing between 0 and
6e-8; the forward writes 0.5, and the backward, with a loss scale of 65,536, makes it 1.3e-3 in one go.
The backward multiplies by weight / D and by the scalar that comes from above. It is one pass more, never left out: only a
host that waits for the device could see that the scalar is 1.

Traffic, e bytes an element: forward Q D e of each of prediction and features read and Q D e written (not where no gradient
is wanted), 12 bytes a row; backward 2 Q D e.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .dispatch import jit, tl

KINDS = ("smooth_l1", "l2", "cosine")


def target_loss_ref(prediction: Tensor, features: Tensor, idx: Tensor, weight: Tensor, kind: str = "smooth_l1") -> Tensor:
    """Compute target_loss in plain PyTorch: every feature row is normalised once, then selected."""
    wide = torch.promote_types(prediction.dtype, torch.float32)
    prediction = prediction.to(wide)
    target = F.layer_norm(features.to(wide), features.shape[-1:]).index_select(0, idx)  # (Q, D)
    if kind == "cosine":
        rows = 1 - F.cosine_similarity(prediction, target, dim=1)
    else:
        distance = F.smooth_l1_loss if kind == "smooth_l1" else F.mse_loss
        rows = distance(prediction, target, reduction="none").mean(dim=1)
    return (rows * weight).sum()  # not a matrix product: autocast would take that to bf16


@jit(do_not_specialize=["Q"])
def _target_loss_fwd_kernel(
    prediction_ptr,  # (Q, D)
    features_ptr,  # (U, D)
    idx_ptr,  # (Q,) int32
    weight_ptr,  # (Q,) fp32
    loss_ptr,  # (Q,) fp32: each row's weighted distance
    direction_ptr,  # (Q, D): D times the gradient of each row's distance, or anything
    Q,
    D,
    stride_pq,
    stride_fu,
    KIND: tl.constexpr,
    WANTS_GRAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_q = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, BLOCK_D)
    mask_q, mask_d = offs_q < Q, (offs_d < D)[None, :]
    mask = mask_q[:, None] & mask_d
    row = tl.load(idx_ptr + offs_q, mask=mask_q, other=0).to(tl.int64)
    p = tl.load(prediction_ptr + offs_q[:, None] * stride_pq + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    f = tl.load(features_ptr + row[:, None] * stride_fu + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    # The layer norm of the target: a program holds whole rows, so mean and variance need no second pass over memory.
    y = tl.where(mask_d, f - (tl.sum(f, axis=1) / D)[:, None], 0.0)
    y *= tl.rsqrt(tl.sum(y * y, axis=1) / D + 1e-5)[:, None]
    # Each kind gives the row's distance and D times its gradient; the norms' floor is that of torch's cosine_similarity.
    if KIND == "cosine":
        p_norm = tl.maximum(tl.sqrt(tl.sum(p * p, axis=1)), 1e-8)
        y_norm = tl.maximum(tl.sqrt(tl.sum(y * y, axis=1)), 1e-8)
        y = y / y_norm[:, None]
        p = p / p_norm[:, None]
        cos = tl.sum(p * y, axis=1)
        distance = 1.0 - cos
        direction = (p * cos[:, None] - y) * (D / p_norm)[:, None]
    elif KIND == "l2":
        error = p - y
        distance = tl.sum(error * error, axis=1) / D
        direction = 2.0 * error
    else:
        error = p - y
        size = tl.abs(error)
        distance = tl.sum(tl.where(size < 1.0, 0.5 * error * error, size - 0.5), axis=1) / D
        direction = tl.where(error >= 1.0, 1.0, tl.where(error <= -1.0, -1.0, error))
    weight = tl.load(weight_ptr + offs_q, mask=mask_q, other=0.0)
    tl.store(loss_ptr + offs_q, weight * distance, mask=mask_q)
    if WANTS_GRAD:
        direction = direction.to(direction_ptr.dtype.element_ty)
        tl.store(direction_ptr + offs_q[:, None] * D + offs_d[None, :], direction, mask=mask)


@jit(do_not_specialize=["Q"])
def _target_loss_bwd_kernel(
    direction_ptr,  # (Q, D)
    weight_ptr,  # (Q,) fp32
    dloss_ptr,  # () fp32
    dprediction_ptr,  # (Q, D)
    Q,
    D,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_q = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_q = offs_q < Q
    mask = mask_q[:, None] & (offs_d < D)[None, :]
    factor = tl.load(weight_ptr + offs_q, mask=mask_q, other=0.0) * (tl.load(dloss_ptr) / D)
    place = offs_q[:, None] * D + offs_d[None, :]
    gradient = tl.load(direction_ptr + place, mask=mask).to(tl.float32) * factor[:, None]
    tl.store(dprediction_ptr + place, gradient.to(dprediction_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("fastjepa_kernels::target_loss_fwd", mutates_args=())
def target_loss_fwd(
    prediction: Tensor, features: Tensor, idx: Tensor, weight: Tensor, kind: str, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss, and the gradient of each row's distance times D: (Q, D), or (0, D) where it is not wanted."""
    prediction, features = dispatch.contiguous_rows(prediction), dispatch.contiguous_rows(features)
    queries, width = prediction.shape
    losses = prediction.new_empty(queries, dtype=torch.float32)
    direction = prediction.new_empty(queries if wants_grad else 0, width)
    if queries:
        block = 1 << (width - 1).bit_length()
        height = max(1, 2048 // block)  # 16 elements a thread: a row stays in registers
        dispatch.launch(
            _target_loss_fwd_kernel, (-(-queries // height),),
            prediction, features, idx.contiguous(), weight.contiguous(), losses, direction,
            queries, width, prediction.stride(0), features.stride(0),
            KIND=kind, WANTS_GRAD=wants_grad, BLOCK_Q=height, BLOCK_D=block, num_warps=min(max(block // 512, 4), 32),
        )  # fmt: skip
    return losses.sum(), direction


@target_loss_fwd.register_fake
def _(prediction, features, idx, weight, kind, wants_grad):
    queries, width = prediction.shape
    return prediction.new_empty((), dtype=torch.float32), prediction.new_empty(queries if wants_grad else 0, width)


@torch.library.custom_op("fastjepa_kernels::target_loss_bwd", mutates_args=())
def target_loss_bwd(direction: Tensor, weight: Tensor, dloss: Tensor) -> Tensor:
    """Scale the direction of each row by weight / D and by the scalar from above."""
    queries, width = direction.shape
    dprediction = torch.empty_like(direction)
    if dprediction.numel():
        block = dispatch.block_width(width)
        height = max(1, 4096 // block)
        dispatch.launch(
            _target_loss_bwd_kernel, (-(-queries // height), -(-width // block)),
            direction, weight.contiguous(), dloss, dprediction, queries, width, BLOCK_Q=height, BLOCK_D=block,
        )  # fmt: skip
    return dprediction


@target_loss_bwd.register_fake
def _(direction, weight, dloss):
    return torch.empty_like(direction)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the direction's own gradient would be a (Q, D) of zeros
    ctx.save_for_backward(output[1], inputs[3])


def _backward(ctx, dloss, ddirection):
    return target_loss_bwd(*ctx.saved_tensors, dloss), None, None, None, None, None


target_loss_fwd.register_autograd(_backward, setup_context=_save)


dispatch.refuse_second_derivative("target_loss", target_loss_bwd)


def target_loss(prediction: Tensor, features: Tensor, idx: Tensor, weight: Tensor, kind: str = "smooth_l1") -> Tensor:
    """Sum the weighted distances between predicted rows and their layer-normalised targets (paper, equation 1).

    Args:
        prediction: (Q, D), fp32, bf16 or fp16.
        features: (U, D) of the target encoder, any of the dtypes; computed under no_grad.
        idx: (Q,) int32, the feature row that each prediction is compared with.
        weight: (Q,) fp32, the weight of each row: 1 / Q for a mean over rows. It has no gradient.
        kind: smooth_l1 (beta 1, the official code), l2 (the paper: mean squared error), or cosine (1 - cosine).

    Returns:
        fp32 scalar, the same bits every time.

    Raises:
        ValueError, TypeError, IndexError: wrong shape, dtype, device or kind; features or a weight that want a gradient;
            an index out of range (CPU and debug only).
    """
    _check(prediction, features, idx, weight, kind)
    if not dispatch.runs_triton("target_loss", prediction):
        return target_loss_ref(prediction, features, idx, weight, kind)
    wants_grad = torch.is_grad_enabled() and prediction.requires_grad
    return target_loss_fwd(prediction, features, idx, weight, kind, wants_grad)[0]


def _check(prediction: Tensor, features: Tensor, idx: Tensor, weight: Tensor, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"target_loss: {kind} is no kind of distance; use one of {', '.join(KINDS)}")
    if prediction.ndim != 2 or features.ndim != 2 or prediction.shape[1] != features.shape[1] or not prediction.shape[1]:
        raise ValueError(
            f"target_loss: prediction (Q, D) needs features (U, D); got {tuple(prediction.shape)}, {tuple(features.shape)}"
        )
    if idx.shape != prediction.shape[:1] or weight.shape != idx.shape:
        raise ValueError(
            f"target_loss: {len(prediction)} predictions need idx and weight ({len(prediction)},); "
            f"got {tuple(idx.shape)}, {tuple(weight.shape)}"
        )
    if torch.is_grad_enabled() and features.requires_grad:
        raise ValueError("target_loss: features have no gradient; compute the target under torch.no_grad()")
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError("target_loss: weight has no gradient; detach it")
    dispatch.check_float("target_loss", prediction=prediction, features=features)
    if weight.dtype != torch.float32:
        raise TypeError(f"target_loss: weight must be float32, not {weight.dtype}; weight.float() converts it")
    dispatch.check_device("target_loss", prediction, features=features, idx=idx, weight=weight)
    dispatch.check_idx("idx", idx, len(features))
