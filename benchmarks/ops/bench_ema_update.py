"""ema_update_: every parameter of ViT-H/14 (ViT-B/16 on a CPU), fp32 averages of fp32 weights."""

import torch
from protocol import Inputs, Provider, Setting, compiled, missing, nbytes
from torch import Tensor

from fastjepa_kernels.ema_update import ema_table, ema_update_, ema_update_ref

MOMENTUM = 0.996


def vit_shapes(width: int, depth: int, hidden: int, patch: int = 16) -> list[tuple[int, ...]]:
    """Return the shapes of a ViT's parameters: a few large matrices and many small vectors."""
    block = [(width,)] * 6 + [(3 * width, width), (3 * width,), (width, width), (hidden, width), (hidden,), (width, hidden)]
    return [(width, 3, patch, patch), (width,), *(block * depth), (width,), (width,)]


def for_loop(targets: list[Tensor], sources: list[Tensor], table) -> None:
    """Average as the official code does."""
    for target, source in zip(targets, sources, strict=True):
        target.mul_(MOMENTUM).add_((1 - MOMENTUM) * source)


def foreach_lerp(targets: list[Tensor], sources: list[Tensor], table) -> None:
    torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)


def with_timm(args: tuple) -> tuple:
    """Put the same tensors into the modules that timm's class wants."""
    from timm.utils import ModelEmaV3

    targets, sources, _ = args
    model = torch.nn.ParameterList(torch.nn.Parameter(source, requires_grad=False) for source in sources)
    return (ModelEmaV3(model, decay=MOMENTUM, foreach=True), model)


PROVIDERS = {
    "eager": lambda targets, sources, table: ema_update_ref(targets, sources, MOMENTUM),
    "compiled": compiled(lambda targets, sources, table: ema_update_ref(targets, sources, MOMENTUM)),
    "for loop": for_loop,
    "torch._foreach_lerp_": foreach_lerp,
    "timm ModelEmaV3": Provider(lambda ema, model: ema.update(model), prepare=with_timm, absent=missing("timm")),
    "ours": lambda targets, sources, table: ema_update_(targets, sources, MOMENTUM, table=table),
}


def make_inputs(setting: Setting) -> Inputs:
    shapes = setting.pick(cuda=vit_shapes(1280, 32, 5120, 14), cpu=vit_shapes(768, 12, 3072), toy=vit_shapes(32, 1, 64))
    targets, sources = ([setting.randn(*shape, dtype=torch.float32) for shape in shapes] for _ in range(2))
    moved = nbytes(*targets, *targets, *sources)
    return Inputs((targets, sources, ema_table(targets, sources)), forward=moved, size=moved)


def test_ema_update(bench):
    bench(make_inputs, "forward")
