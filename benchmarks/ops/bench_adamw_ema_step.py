"""adamw_ema_step_: AdamW and the moving average over ViT-H/14 (ViT-B/16 on a CPU): fp32 weights, moments and averages."""

import torch
from bench_ema_update import MOMENTUM, vit_shapes
from protocol import Inputs, Provider, Setting, compiled, nbytes

from fastjepa_kernels.adamw_ema_step import adamw_ema_step_, adamw_ema_step_ref, adamw_ema_table

LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.05


def torch_optimizer(**options: bool):
    """Return what prepares torch.optim.AdamW over one set of the tensors."""

    def prepare(args: tuple) -> tuple:
        params, grads, targets = (args[place] for place in (0, 1, 7))
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        return torch.optim.AdamW(params, LR, BETAS, EPS, WEIGHT_DECAY, **options), params, targets

    return prepare


def then_foreach_lerp(optimizer: torch.optim.Optimizer, params: list, targets: list) -> None:
    optimizer.step()
    torch._foreach_lerp_(targets, params, 1 - MOMENTUM)


def then_for_loop(optimizer: torch.optim.Optimizer, params: list, targets: list) -> None:
    optimizer.step()
    for target, param in zip(targets, params, strict=True):
        target.mul_(MOMENTUM).add_((1 - MOMENTUM) * param)


PROVIDERS = {
    "eager": adamw_ema_step_ref,
    "compiled": compiled(then_foreach_lerp)._replace(prepare=torch_optimizer(foreach=True), whole=False),
    "torch fused + foreach": Provider(then_foreach_lerp, torch_optimizer(fused=True)),
    "torch foreach + foreach": Provider(then_foreach_lerp, torch_optimizer(foreach=True)),
    "torch for loops": Provider(then_for_loop, torch_optimizer(foreach=False, fused=False)),
    "ours": adamw_ema_step_,
}


def make_inputs(setting: Setting) -> Inputs:
    shapes = setting.pick(cuda=vit_shapes(1280, 32, 5120, 14), cpu=vit_shapes(768, 12, 3072), toy=vit_shapes(32, 1, 64))
    params, grads, moments, squares, targets = (
        [setting.randn(*shape, dtype=torch.float32) for shape in shapes] for _ in range(5)
    )
    squares = [square.square_() for square in squares]
    hyper = torch.tensor([[LR, *BETAS, EPS, WEIGHT_DECAY]], dtype=torch.float64, device=setting.device)
    steps, groups = torch.ones(len(shapes), device=setting.device), [0] * len(shapes)
    table = adamw_ema_table(params, grads, moments, squares, groups, targets)
    moved = nbytes(*grads, *(2 * (params + moments + squares + targets)))
    args = (params, grads, moments, squares, steps, hyper, groups, targets, MOMENTUM, (), None, table)
    return Inputs(args, forward=moved, size=moved)


def test_adamw_ema_step(bench):
    bench(make_inputs, "forward")
