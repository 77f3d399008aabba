"""adamw_ema_step_: AdamW, the moving average of the new parameters and its bf16 copy, in one pass over them.

    m <- m + (1 - beta1) (g - m)                              v <- beta2 v + (1 - beta2) g^2
    p <- (1 - lr weight_decay) p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
    target <- target + (1 - momentum) (p - target)            copy <- bf16(target)

in fp32, where `finite` holds; nothing is written elsewhere, and no count t advances. Decoupled decay, bias correction and
eps as in torch.optim.AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019).

Traffic, e_g and e_t bytes an element of gradient and target: 24 + e_g without a target, 24 + e_g + 2 e_t with one, 2 for a
copy; 16 bytes a chunk of 4096 elements for its place. Apart, AdamW and the average move p once more: 4 bytes.

Tensors are found through a table, as in ema_update, with rows of nine. lr, betas, eps and weight decay are read from
`hyper`, a row a group, on the device, so that a schedule needs neither a wait nor a new CUDA graph. An example: weights in
group 0, biases in group 1, which do not decay; `groups` [0, 0, 1] for three parameters.

    hyper (2, 5) fp64   [[1e-3, 0.9, 0.999, 1e-8, 0.05], [1e-3, 0.9, 0.999, 1e-8, 0.0]]
    coefficients (3, 7) of step 2, row 0: 1 - lr wd = 0.99995, 1 - beta1 = 0.1, beta2 = 0.999, 1 - beta2 = 0.001,
        lr / (1 - beta1^2) = 5.263e-3, 1 / sqrt(1 - beta2^2) = 22.366, eps = 1e-8
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .dispatch import jit, tl
from .ema_update import (
    ALIGNED,
    CHUNK,
    COPY,
    Table,
    address,
    check_alike,
    check_apart,
    check_scalars,
    ema_update_ref,
    fitting,
    kind_of,
    make_table,
)

BF16_GRAD, BF16_TARGET = 1, 2  # bits of a kind, beside COPY and ALIGNED
MASTER, NARROW = (torch.float32,), (torch.float32, torch.bfloat16)


class Stepped(NamedTuple):
    """Tensors of one step, parameter by parameter: those of `adamw_ema_step_`, in its order."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    groups: Sequence[int]
    targets: Sequence[Tensor]
    copies: Sequence[Tensor]


def adamw_ema_step_ref(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Tensor,
    hyper: Tensor,
    groups: Sequence[int],
    targets: Sequence[Tensor] = (),
    momentum: float | Tensor = 1.0,
    copies: Sequence[Tensor] = (),
    finite: Tensor | None = None,
    table: Table | None = None,
) -> None:
    """Compute adamw_ema_step_ by torch's fused AdamW; it reads `hyper`, for which a GPU would have to be waited for."""
    counts = steps.unbind()
    advance = 1.0 if finite is None else finite.float()
    for group, (lr, beta1, beta2, eps, weight_decay) in enumerate(hyper.tolist()):
        live = [i for i, grad in enumerate(grads) if grad is not None and groups[i] == group]
        if not live:
            continue
        of_group = [[each[i] for i in live] for each in (params, exp_avgs, exp_avg_sqs, counts)]
        torch._foreach_add_(of_group[3], advance)
        torch._fused_adamw_(
            of_group[0], [grads[i].to(params[i].dtype) for i in live], *of_group[1:3], [], of_group[3],
            lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, amsgrad=False, maximize=False,
            found_inf=None if finite is None else 1.0 - advance,
        )  # fmt: skip
    ema_update_ref(targets, params[: len(targets)], momentum, finite, copies)


@jit
def _adamw_coefficients_kernel(
    addresses_ptr,  # (n, 9) int64: param, grad, exp_avg, exp_avg_sq, target, copy, group, elements, kind
    hyper_ptr,  # (G, 5) fp64: lr, beta1, beta2, eps, weight_decay
    steps_ptr,  # (n,) fp32
    finite_ptr,  # () bool, or anything
    coefficients_ptr,  # (n, 7) fp32
    n,
    HAS_FINITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the coefficients that all chunks of a tensor share, in fp64, as 1 - beta^t cancels, and advance its count.

    The count has a launch of its own, because the chunks of a tensor would race for it.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    row = addresses_ptr + offs.to(tl.int64) * 9
    # A parameter without a gradient (address 0) does not count the step, nor does any in a step that is not finite.
    stepped = mask & (tl.load(row + 1, mask=mask, other=0) != 0)
    if HAS_FINITE:
        stepped = stepped & (tl.load(finite_ptr) != 0)
    hyper = hyper_ptr + tl.load(row + 6, mask=mask, other=0) * 5
    lr = tl.load(hyper, mask=mask, other=0.0)
    beta1 = tl.load(hyper + 1, mask=mask, other=0.5)
    beta2 = tl.load(hyper + 2, mask=mask, other=0.5)
    # This step's number, and the corrections 1 - beta^step of both moments.
    step = tl.load(steps_ptr + offs, mask=mask, other=0.0) + 1.0
    correction1 = 1.0 - tl.exp(tl.log(beta1) * step.to(tl.float64))
    correction2 = 1.0 - tl.exp(tl.log(beta2) * step.to(tl.float64))
    out = coefficients_ptr + offs * 7
    tl.store(out, (1.0 - lr * tl.load(hyper + 4, mask=mask, other=0.0)).to(tl.float32), mask=mask)
    tl.store(out + 1, (1.0 - beta1).to(tl.float32), mask=mask)
    tl.store(out + 2, beta2.to(tl.float32), mask=mask)
    tl.store(out + 3, (1.0 - beta2).to(tl.float32), mask=mask)
    tl.store(out + 4, (lr / correction1).to(tl.float32), mask=mask)
    tl.store(out + 5, (1.0 / tl.sqrt(correction2)).to(tl.float32), mask=mask)
    tl.store(out + 6, tl.load(hyper + 3, mask=mask, other=0.0).to(tl.float32), mask=mask)
    tl.store(steps_ptr + offs, step, mask=stepped)


@jit
def _adamw_ema_step_fwd_kernel(
    addresses_ptr,  # (n, 9) int64: param, grad, exp_avg, exp_avg_sq, target, copy, group, elements, kind
    chunks_ptr,  # (C, 2) int64: row of addresses, first element
    coefficients_ptr,  # (n, 7) fp32
    momentum_ptr,  # () fp32, or anything
    finite_ptr,  # () bool, or anything
    weight,  # 1 - momentum, where it is no tensor
    HAS_MOMENTUM: tl.constexpr,
    HAS_FINITE: tl.constexpr,
    HAS_COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD: tl.constexpr,  # dtype
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # From the program's chunk to its tensor's row of addresses, and to the coefficients of that tensor.
    chunk = tl.program_id(0).to(tl.int64) * 2
    number = tl.load(chunks_ptr + chunk)
    first = tl.load(chunks_ptr + chunk + 1)
    row = addresses_ptr + number * 9
    shared = coefficients_ptr + number * 7
    grad_address, target_address = tl.load(row + 1), tl.load(row + 4)
    param_ptr = tl.load(row).to(tl.pointer_type(tl.float32)) + first
    grad_ptr = grad_address.to(tl.pointer_type(GRAD)) + first
    exp_avg_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + first
    exp_avg_sq_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32)) + first
    target_ptr = target_address.to(tl.pointer_type(TARGET)) + first
    copy_ptr = tl.load(row + 5).to(tl.pointer_type(tl.bfloat16)) + first
    elements = tl.load(row + 7) - first
    if ALIGNED:
        param_ptr, grad_ptr = tl.multiple_of(param_ptr, 16), tl.multiple_of(grad_ptr, 16)
        exp_avg_ptr, exp_avg_sq_ptr = tl.multiple_of(exp_avg_ptr, 16), tl.multiple_of(exp_avg_sq_ptr, 16)
        target_ptr, copy_ptr = tl.multiple_of(target_ptr, 16), tl.multiple_of(copy_ptr, 16)
        elements = elements // 8 * 8  # the rest is another launch's
    offs = tl.arange(0, BLOCK)
    mask = offs < elements
    if HAS_FINITE:
        mask = mask & (tl.load(finite_ptr) != 0)
    stepped = mask & (grad_address != 0)
    # AdamW: m += (1 - beta1) (g - m), v = beta2 v + (1 - beta2) g^2, then the parameter, its decay apart from both.
    param = tl.load(param_ptr + offs, mask=mask)
    grad = tl.load(grad_ptr + offs, mask=stepped, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + offs, mask=stepped, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=stepped, other=0.0)
    exp_avg += tl.load(shared + 1) * (grad - exp_avg)
    exp_avg_sq = exp_avg_sq * tl.load(shared + 2) + tl.load(shared + 3) * grad * grad
    tl.store(exp_avg_ptr + offs, exp_avg, mask=stepped)
    tl.store(exp_avg_sq_ptr + offs, exp_avg_sq, mask=stepped)
    change = tl.load(shared + 4) * exp_avg / (tl.sqrt(exp_avg_sq) * tl.load(shared + 5) + tl.load(shared + 6))
    param = tl.where(stepped, param * tl.load(shared) - change, param)
    tl.store(param_ptr + offs, param, mask=stepped)
    # The average of the parameter as it has just become, still in registers: this is what one pass saves.
    averaged = mask & (target_address != 0)
    if HAS_MOMENTUM:
        weight = 1.0 - tl.load(momentum_ptr)
    near = weight < 0.5
    target = tl.load(target_ptr + offs, mask=averaged, other=0.0).to(tl.float32)
    moved = tl.where(near, target, param) + tl.where(near, weight, weight - 1.0) * (param - target)
    average = moved.to(TARGET)
    tl.store(target_ptr + offs, average, mask=averaged)
    if HAS_COPY:
        tl.store(copy_ptr + offs, average.to(tl.bfloat16), mask=averaged)


def owners_of(tensors: Stepped) -> Tensor:
    """Return (n, 9) int64 on the CPU: six addresses (0: none), group, elements, kind of each parameter.

    A gradient without elements has no address, but its parameter still counts the step: any other address will do.
    """
    rows = []
    for i, param in enumerate(tensors.params):
        grad, target = tensors.grads[i], tensors.targets[i] if i < len(tensors.targets) else None
        grad_place = 0 if grad is None else grad.data_ptr() or 16
        averages = (address(target), address(tensors.copies[i] if i < len(tensors.copies) else None))
        moments = (tensors.exp_avgs[i].data_ptr(), tensors.exp_avg_sqs[i].data_ptr())
        places = (param.data_ptr(), grad_place, *moments, *averages)
        bits = BF16_GRAD * (grad is not None and grad.dtype == torch.bfloat16)
        bits |= BF16_TARGET * (target is not None and target.dtype == torch.bfloat16)
        bits |= COPY * bool(tensors.copies)
        rows.append((*places, tensors.groups[i], param.numel(), kind_of(places, bits)))
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 9)


def run_kernels(
    table: Table, steps: Tensor, hyper: Tensor, weight: float, momentum: Tensor | None, finite: Tensor | None
) -> None:
    """Launch the kernel of the coefficients, then the step once for each kind of tensor."""
    coefficients = steps.new_empty(len(steps), 7)  # (n, 7) fp32
    dispatch.launch(
        _adamw_coefficients_kernel, (-(-len(steps) // 128),),
        table.addresses, hyper, steps, steps if finite is None else finite, coefficients, len(steps),
        HAS_FINITE=finite is not None, BLOCK=128, num_warps=4,
    )  # fmt: skip
    for chunks, kind in zip(table.chunks, table.kinds, strict=True):
        dispatch.launch(
            _adamw_ema_step_fwd_kernel, (len(chunks),),
            table.addresses, chunks, coefficients,
            chunks if momentum is None else momentum, chunks if finite is None else finite, weight,
            HAS_MOMENTUM=momentum is not None, HAS_FINITE=finite is not None,
            HAS_COPY=bool(kind & COPY), ALIGNED=bool(kind & ALIGNED),
            GRAD=tl.bfloat16 if kind & BF16_GRAD else tl.float32,
            TARGET=tl.bfloat16 if kind & BF16_TARGET else tl.float32,
            BLOCK=CHUNK, num_warps=16,
        )  # fmt: skip


@torch.library.custom_op(
    "fastjepa_kernels::adamw_ema_step_fwd",
    mutates_args={"params", "exp_avgs", "exp_avg_sqs", "steps", "targets", "copies"},
)
def adamw_ema_step_fwd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Tensor,
    hyper: Tensor,
    groups: Sequence[int],
    targets: Sequence[Tensor],
    copies: Sequence[Tensor],
    weight: float,
    momentum: Tensor | None,
    finite: Tensor | None,
    owners: Tensor | None,
    addresses: Tensor | None,
    chunks: Sequence[Tensor],
    kinds: Sequence[int],
) -> None:
    """Run the kernel or the definition: chosen in here, because the definition reads `hyper`, which no compiled graph can."""
    if not dispatch.runs_triton("adamw_ema_step", params[0]):
        momentum = 1.0 - weight if momentum is None else momentum
        adamw_ema_step_ref(params, grads, exp_avgs, exp_avg_sqs, steps, hyper, groups, targets, momentum, copies, finite)
        return
    table = None if owners is None else Table(owners, addresses, chunks, kinds)
    here = owners_of(Stepped(params, grads, exp_avgs, exp_avg_sqs, groups, targets, copies))
    run_kernels(fitting(table, here, params[0].device), steps, hyper, weight, momentum, finite)


@adamw_ema_step_fwd.register_fake
def _(*arguments):
    return None


def adamw_ema_table(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    groups: Sequence[int],
    targets: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
) -> Table:
    """Make the table of these tensors once, for every later step; gradients may move afterwards, at little cost."""
    tensors = Stepped(params, grads, exp_avgs, exp_avg_sqs, groups, targets, copies)
    _check_tensors(tensors)
    _check_apart(tensors)
    return make_table(owners_of(tensors), params[0].device if params else torch.device("cpu"))


def adamw_ema_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Tensor,
    hyper: Tensor,
    groups: Sequence[int],
    targets: Sequence[Tensor] = (),
    momentum: float | Tensor = 1.0,
    copies: Sequence[Tensor] = (),
    finite: Tensor | None = None,
    table: Table | None = None,
) -> None:
    """Take one step of AdamW, and one of the moving average of the new parameters, all in place.

    Args:
        params: fp32, contiguous, on one device; those that have a target first.
        grads: one for each, fp32 or bf16; None leaves a parameter, its moments and its count as they are (its target
            still moves).
        exp_avgs, exp_avg_sqs: fp32 moments, one for each.
        steps: (n,) fp32: how many steps each parameter has made.
        hyper: (G, 5) fp64 on the device: lr, beta1, beta2, eps and weight_decay of each group, such as
            [[1e-3, 0.9, 0.999, 1e-8, 0.05]].
        groups: the row of `hyper` of each parameter.
        targets: of the first len(targets) parameters; fp32 or bf16.
        momentum: between 0 and 1; a float, or a 0-dim fp32 tensor on the device, which a CUDA graph reads at each replay.
        copies: bf16, one for each target, or none.
        finite: 0-dim bool tensor on the device; where it is False nothing is written.
        table: adamw_ema_table(...) where it is made beforehand; else it is made here.

    Raises:
        ValueError, TypeError, IndexError: wrong number, shape, dtype, layout or device; a group that `hyper` lacks; a
            momentum outside [0, 1], or tensors that are written and share memory with another (CPU and debug only).
    """
    tensors = Stepped(params, grads, exp_avgs, exp_avg_sqs, groups, targets, copies)
    _check_tensors(tensors)
    if not params:
        return
    dispatch.check_untransformed("adamw_ema_step")
    _check_steps(params, steps, hyper, groups)
    check_scalars("adamw_ema_step", params[0], momentum, finite)
    if dispatch.may_read(params[0]):
        _check_apart(tensors)
    given = isinstance(momentum, Tensor)
    with torch.no_grad():
        adamw_ema_step_fwd(
            params, grads, exp_avgs, exp_avg_sqs, steps, hyper, groups, targets, copies,
            0.0 if given else 1.0 - momentum, momentum if given else None, finite, *(table or (None, None, [], [])),
        )  # fmt: skip


def _check_steps(params: Sequence[Tensor], steps: Tensor, hyper: Tensor, groups: Sequence[int]) -> None:
    if steps.shape != (len(params),) or steps.dtype != torch.float32 or not steps.is_contiguous():
        raise ValueError(
            f"adamw_ema_step: steps must be ({len(params)},) of float32, contiguous, not {tuple(steps.shape)} of {steps.dtype}"
        )
    if hyper.ndim != 2 or hyper.shape[1] != 5 or hyper.dtype != torch.float64 or not hyper.is_contiguous():
        raise ValueError(
            f"adamw_ema_step: hyper must be (G, 5) of float64, contiguous, not {tuple(hyper.shape)} of {hyper.dtype}"
        )
    if min(groups) < 0 or max(groups) >= len(hyper):
        raise IndexError(f"adamw_ema_step: groups go from {min(groups)} to {max(groups)}, hyper has {len(hyper)} rows")
    dispatch.check_device("adamw_ema_step", params[0], steps=steps, hyper=hyper)


def _check_apart(tensors: Stepped) -> None:
    """Check that no tensor shares memory with one that is written; moments without a gradient are neither read nor written."""
    live = [i for i, grad in enumerate(tensors.grads) if grad is not None]
    moments = [each[i] for each in (tensors.exp_avgs, tensors.exp_avg_sqs) for i in live]
    written = [*tensors.params, *moments, *tensors.targets, *tensors.copies]
    check_apart("adamw_ema_step", written, [tensors.grads[i] for i in live])


def _check_tensors(tensors: Stepped) -> None:
    params, grads, exp_avgs, exp_avg_sqs, groups, targets, copies = tensors
    op, present = "adamw_ema_step", [i for i, grad in enumerate(grads) if grad is not None]
    check_alike(op, "params", params, params, MASTER)
    check_alike(op, "exp_avgs", exp_avgs, params, MASTER)
    check_alike(op, "exp_avg_sqs", exp_avg_sqs, params, MASTER)
    for name, given, most in (("grads", grads, params), ("groups", groups, params)):
        if len(given) != len(most):
            raise ValueError(f"{op}: there are {len(given)} {name} for {len(most)} tensors; give one for each")
    check_alike(op, "grads", [grads[i] for i in present], [params[i] for i in present], NARROW)
    if len(targets) > len(params):
        raise ValueError(f"{op}: there are {len(targets)} targets for {len(params)} params; give each its own parameter")
    check_alike(op, "targets", targets, params[: len(targets)], NARROW)
    if copies:
        check_alike(op, "copies", copies, targets, (torch.bfloat16,))
