"""timm's vision transformer, on which I-JEPA, MAE and iBOT are compared, and a training step in the trainer's own loop.

A method is a module with a forward, which is autocast, and a `loss`, which is not. Its attributes are `encoder` and
`predictor`, the trained networks as the optimizer groups them; `networks`, all that are compiled; and `averaged`, the pair of
an average and the network it follows, or None.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from work import STEPS_PER_EPOCH

from fastjepa.config.schema import Config
from fastjepa.engine.average import Average
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.precision import COMPUTE_DTYPES, autocast_of
from fastjepa.engine.schedule import Schedule
from fastjepa.errors import UserError
from fastjepa.model.vit import choose_attention

NORM = partial(nn.LayerNorm, eps=1e-6)


def backbone(config: Config, class_token: bool = True, positions: Tensor | None = None, views: bool = False) -> nn.Module:
    """Build lightly's MaskedVisionTransformerTIMM in the shape of the config; it returns all tokens, after the final norm.

    Args:
        class_token: whether a class token precedes the patches.
        positions: (1, N, D), fixed; None for learned ones.
        views: take images of several sizes, resampling the positions.
    """
    modules, vision_transformer = import_libraries()
    dim, depth, heads, mlp_ratio = config.encoder_shape
    vit = vision_transformer.VisionTransformer(
        img_size=config.image_size, patch_size=config.mask.patch_size, in_chans=config.data.channels, num_classes=0,
        global_pool="", embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=mlp_ratio, class_token=class_token,
        dynamic_img_size=views, norm_layer=NORM,
    )  # fmt: skip
    masked = modules.MaskedVisionTransformerTIMM(vit=vit, antialias=False, pos_embed_initialization="skip")
    if positions is not None:
        vit.pos_embed.requires_grad_(False).copy_(positions)
    return masked


def import_libraries() -> tuple:
    """Return (lightly.models.modules, timm.models.vision_transformer); UserError where one is absent."""
    try:
        from lightly.models import modules
        from timm.models import vision_transformer
    except ImportError as error:
        raise UserError(f"MAE, iBOT and timm's ViT need lightly and timm ({error}); pip install 'fastjepa[bench]'") from error
    return modules, vision_transformer


def materialise(networks: Iterable[nn.Module]) -> None:
    """Let timm's attention write its whole (N, N) matrix, as it did when the official codes were written."""
    for network in networks:
        for module in network.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False


def count_flops(kind: type[nn.Module], config: Config, batches: Iterable[tuple[Tensor, ...]]) -> list[float]:
    """Return the FLOPs per image of a training step on each batch, as torch counts them, on tensors without data.

    Attention is materialised, as the counter knows no fused one of a CPU; the products are the same.
    """
    with torch.device("meta"):
        method = kind(config, torch.device("meta"))
    materialise(method.networks)
    found = []
    for batch in batches:
        with FlopCounterMode(display=False) as counter:
            outputs = method(*(tensor.to("meta") for tensor in batch))
            sum(output.sum() for output in outputs if output.requires_grad).backward()
        found.append(counter.get_total_flops() / config.data.batch_size)
    return found


class MethodStep:
    """The trainer's engine, fused AdamW, schedules and average; call it with the number of a round."""

    def __init__(self, method: type, config: Config, device: torch.device, batches: list[tuple]):
        self.config, self.device, self.batches = config, device, batches
        self.flops = count_flops(method, config, batches)
        self.method = method(config, device)
        self.now = Schedule(config.optimization, STEPS_PER_EPOCH)(0)
        self.parameters = [p for p in self.method.parameters() if p.requires_grad]
        way = choose_attention(config.runtime.attention, device, COMPUTE_DTYPES[config.runtime.dtype])
        if way == "matmul":  # bf16 on a CPU
            materialise(self.method.networks)
        if config.runtime.compile:
            for network in self.method.networks:
                network.compile(dynamic=True)
        self.engine = PlainEngine(self.method)
        self.engine.parameters = self.parameters  # its own list has the frozen ones, which have no gradients
        self.average = Average(*self.method.averaged) if self.method.averaged else None

    def __call__(self, number: int) -> Tensor:
        loss = self.loss(number)
        self.engine.backward(loss)
        finite = self.engine.step(self.now)
        if self.average:
            self.average.update(self.now.ema_momentum, finite)
        return loss.detach()

    def loss(self, number: int) -> Tensor:
        with autocast_of(COMPUTE_DTYPES[self.config.runtime.dtype], self.device):
            outputs = self.method(*self.batches[number % len(self.batches)])
        return self.method.loss(*outputs)
