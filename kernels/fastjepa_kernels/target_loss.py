"""target_loss: compute I-JEPA's loss between predicted rows and layer-normalised target features, with its gradient.

    y[q] = layer_norm(features[idx[q]])                  over D, without affine, eps 1e-5
    loss = sum of weight[q] * distance(prediction[q], y[q])
    distance = mean over D of smooth_l1 (beta 1), or of the squared error; or 1 - cos, as torch's cosine_similarity

Features may be those of L layers, each normalised by itself. A prediction of width L D is then compared with all of them,
layer by layer, and its distance is the mean of theirs; one of width D with their average, normalised again.

All in fp32, whatever the dtypes. The forward also writes the gradient, in the same pass over the data, without its factor
weight / D: that is below the smallest number of fp16 before a loss scale can multiply it. An example: 20,000 rows of D =
1280, each of weight 1 / 20000, error 0.5. The gradient is 0.5 / 20000 / 1280 = 2e-8, and fp16 has nothing between 0 and
6e-8; the forward writes 0.5, and the backward, with a loss scale of 65,536, makes it 1.3e-3 in one go.
The backward multiplies by weight / D and by the scalar that comes from above. It is one pass more, never left out: only a
host that waits for the device could see that the scalar is 1.

Traffic, e bytes an element: forward Q D e of each of prediction and features read and Q D e written (not where no gradient
is wanted), 12 bytes a row; backward 2 Q D e. With L layers, each of which is read from where it lies, all of that is L times
as much, but for the 12 bytes; where their average is predicted, the reads of the features alone.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .dispatch import jit, tl

KINDS = ("smooth_l1", "l2", "cosine")


def target_loss_ref(
    prediction: Tensor, features: Tensor | Sequence[Tensor], idx: Tensor, weight: Tensor, kind: str = "smooth_l1"
) -> Tensor:
    """Compute target_loss in plain PyTorch: every feature row is normalised once, then selected."""
    layers = layers_of(features)
    wide = torch.promote_types(prediction.dtype, torch.float32)
    prediction, width = prediction.to(wide), layers[0].shape[1]
    normal = [F.layer_norm(layer.to(wide), (width,)) for layer in layers]  # L of (U, D)
    if predicts_average(prediction, layers):
        normal = [F.layer_norm(torch.stack(normal).mean(dim=0), (width,))]
    parts = zip(prediction.split(width, dim=1), normal, strict=True)
    rows = sum(_row_distances(part, target.index_select(0, idx), kind) for part, target in parts) / len(normal)  # (Q,)
    return (rows * weight).sum()  # not a matrix product: autocast would take that to bf16


def layers_of(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the features of each layer, (U, D); a tensor is those of one."""
    return [features] if isinstance(features, Tensor) else list(features)


def predicts_average(prediction: Tensor, layers: Sequence[Tensor]) -> bool:
    """Return whether a prediction is as wide as one of several layers: it is then one of their average."""
    return len(layers) > 1 and prediction.shape[1] == layers[0].shape[1]


def _row_distances(prediction: Tensor, target: Tensor, kind: str) -> Tensor:
    if kind == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=1)
    distance = F.smooth_l1_loss if kind == "smooth_l1" else F.mse_loss
    return distance(prediction, target, reduction="none").mean(dim=1)


@jit
def _normal_rows(x, mask_d, D):
    """Layer-normalise rows (BLOCK_Q, BLOCK_D): a program holds whole ones, so nothing needs a second pass over memory."""
    x = tl.where(mask_d, x - (tl.sum(x, axis=1) / D)[:, None], 0.0)
    return x * tl.rsqrt(tl.sum(x * x, axis=1) / D + 1e-5)[:, None]


@jit
def _distance_rows(p, y, D, KIND: tl.constexpr):
    """Return each row's distance and D times its gradient; the norms' floor is that of torch's cosine_similarity."""
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
    return distance, direction


@jit(do_not_specialize=["Q"])
def _target_loss_fwd_kernel(
    prediction_ptr,  # (Q, PARTS * D)
    features_ptrs,  # LAYERS of (U, D)
    idx_ptr,  # (Q,) int32
    weight_ptr,  # (Q,) fp32
    loss_ptr,  # (Q,) fp32: each row's weighted distance
    direction_ptr,  # (Q, PARTS * D): PARTS * D times the gradient of each row's distance, or anything
    Q,
    D,
    stride_pq,
    stride_fu,
    LAYERS: tl.constexpr,
    PARTS: tl.constexpr,  # of the prediction: LAYERS, or 1 where their average is predicted
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
    place = row[:, None] * stride_fu + offs_d[None, :]
    total = tl.zeros((BLOCK_Q,), tl.float32)
    for part in tl.static_range(PARTS):
        p = tl.load(prediction_ptr + offs_q[:, None] * stride_pq + part * D + offs_d[None, :], mask=mask, other=0.0)
        y = _normal_rows(tl.load(features_ptrs[part] + place, mask=mask, other=0.0).to(tl.float32), mask_d, D)
        if PARTS < LAYERS:
            for layer in tl.static_range(1, LAYERS):
                y += _normal_rows(tl.load(features_ptrs[layer] + place, mask=mask, other=0.0).to(tl.float32), mask_d, D)
            y = _normal_rows(y / LAYERS, mask_d, D)
        distance, direction = _distance_rows(p.to(tl.float32), y, D, KIND)
        total += distance
        if WANTS_GRAD:
            direction = direction.to(direction_ptr.dtype.element_ty)
            tl.store(direction_ptr + offs_q[:, None] * (PARTS * D) + part * D + offs_d[None, :], direction, mask=mask)
    weight = tl.load(weight_ptr + offs_q, mask=mask_q, other=0.0)
    tl.store(loss_ptr + offs_q, weight * (total / PARTS), mask=mask_q)


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
    prediction: Tensor, features: Sequence[Tensor], idx: Tensor, weight: Tensor, kind: str, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss, and the gradient of each row's distance times its width, as wide as the prediction; no row of it
    where it is not wanted.
    """
    prediction, features = dispatch.contiguous_rows(prediction), [dispatch.contiguous_rows(layer) for layer in features]
    if len({layer.stride(0) for layer in features}) > 1:
        features = [layer.contiguous() for layer in features]
    queries, width = len(prediction), features[0].shape[1]
    losses = prediction.new_empty(queries, dtype=torch.float32)
    direction = prediction.new_empty(queries if wants_grad else 0, prediction.shape[1])
    if queries:
        block = 1 << (width - 1).bit_length()
        height = max(1, 2048 // block)  # 16 elements a thread: a row stays in registers
        dispatch.launch(
            _target_loss_fwd_kernel, (-(-queries // height),),
            prediction, tuple(features), idx.contiguous(), weight.contiguous(), losses, direction,
            queries, width, prediction.stride(0), features[0].stride(0), LAYERS=len(features),
            PARTS=1 if predicts_average(prediction, features) else len(features),
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
    ctx.layers = len(inputs[1])


def _backward(ctx, dloss, ddirection):
    return target_loss_bwd(*ctx.saved_tensors, dloss), [None] * ctx.layers, None, None, None, None


target_loss_fwd.register_autograd(_backward, setup_context=_save)


dispatch.refuse_second_derivative("target_loss", target_loss_bwd)


def target_loss(
    prediction: Tensor, features: Tensor | Sequence[Tensor], idx: Tensor, weight: Tensor, kind: str = "smooth_l1"
) -> Tensor:
    """Sum the weighted distances between predicted rows and their layer-normalised targets (paper, equation 1).

    Args:
        prediction: (Q, D), fp32, bf16 or fp16; (Q, L D) to predict L layers.
        features: (U, D) of the target encoder, any of the dtypes, or a sequence of L of them; computed under no_grad.
        idx: (Q,) int32, the feature row that each prediction is compared with.
        weight: (Q,) fp32, the weight of each row: 1 / Q for a mean over rows. It has no gradient.
        kind: smooth_l1 (beta 1, the official code), l2 (the paper: mean squared error), or cosine (1 - cosine).

    Returns:
        fp32 scalar, the same bits every time.

    Raises:
        ValueError, TypeError, IndexError: wrong shape, dtype, device or kind; features or a weight that want a gradient;
            an index out of range (CPU and debug only).
    """
    layers = layers_of(features)
    _check(prediction, layers, idx, weight, kind)
    if not dispatch.runs_triton("target_loss", prediction):
        return target_loss_ref(prediction, layers, idx, weight, kind)
    wants_grad = torch.is_grad_enabled() and prediction.requires_grad
    return target_loss_fwd(prediction, layers, idx, weight, kind, wants_grad)[0]


def _check(prediction: Tensor, layers: list[Tensor], idx: Tensor, weight: Tensor, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"target_loss: {kind} is no kind of distance; use one of {', '.join(KINDS)}")
    if not _fit(prediction, layers):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (prediction, *layers))
        raise ValueError(
            f"target_loss: prediction (Q, D) needs features (U, D), or L of them that it is as wide as, or as one; got {shapes}"
        )
    if idx.shape != prediction.shape[:1] or weight.shape != idx.shape:
        raise ValueError(
            f"target_loss: {len(prediction)} predictions need idx and weight ({len(prediction)},); "
            f"got {tuple(idx.shape)}, {tuple(weight.shape)}"
        )
    if torch.is_grad_enabled() and any(layer.requires_grad for layer in layers):
        raise ValueError("target_loss: features have no gradient; compute the target under torch.no_grad()")
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError("target_loss: weight has no gradient; detach it")
    named = {f"features[{i}]" if i else "features": layer for i, layer in enumerate(layers)}
    dispatch.check_float("target_loss", prediction=prediction, **named)
    if weight.dtype != torch.float32:
        raise TypeError(f"target_loss: weight must be float32, not {weight.dtype}; weight.float() converts it")
    dispatch.check_device("target_loss", prediction, **named, idx=idx, weight=weight)
    dispatch.check_idx("idx", idx, len(layers[0]))


def _fit(prediction: Tensor, layers: list[Tensor]) -> bool:
    """Return whether the layers are matrices of one shape, and the prediction one as wide as one or as all of them."""
    if prediction.ndim != 2 or not layers or layers[0].ndim != 2 or not layers[0].shape[1]:
        return False
    width = layers[0].shape[1]
    return all(x.shape == layers[0].shape for x in layers) and prediction.shape[1] in (width, len(layers) * width)
