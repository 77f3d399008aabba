"""timm's vision transformer as lightly masks it: the backbone that I-JEPA, MAE and iBOT are compared on."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from fastjepa.config.schema import Config
from fastjepa.errors import ConfigError

NORM = partial(nn.LayerNorm, eps=1e-6)


def backbone(config: Config, class_token: bool = True, positions: Tensor | None = None, views: bool = False) -> nn.Module:
    """lightly's MaskedVisionTransformerTIMM of the config's shape; it returns all tokens, after the final norm.

    Args:
        class_token: whether a class token precedes the patches.
        positions: (1, N, D), fixed; None for learned ones.
        views: take images of several sizes, resampling the positions.
    """
    modules, vision_transformer = parts()
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


def parts() -> tuple:
    """(lightly.models.modules, timm.models.vision_transformer); ConfigError where one is absent."""
    try:
        from lightly.models import modules
        from timm.models import vision_transformer
    except ImportError as error:
        raise ConfigError(f"MAE, iBOT and timm's ViT need lightly and timm ({error}); pip install 'fastjepa[bench]'") from error
    return modules, vision_transformer


def materialise(networks: Iterable[nn.Module]) -> None:
    """Let timm's attention write its whole (N, N) matrix, as it did when the official codes were written."""
    for network in networks:
        for module in network.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False


def images(config: Config, number: int, count: int, side: int | None = None) -> Tensor:
    """(count, C, side, side) fp32, on the host: the same for the same seed and number."""
    generator = torch.Generator().manual_seed(config.runtime.seed + number)
    height, width = (side, side) if side else config.image_size
    return torch.randn(count, config.data.channels, height, width, generator=generator)


def linear(rows: float, width_in: int, width_out: int) -> float:
    """FLOPs of a linear layer's forward; a multiply-add is 2."""
    return 2.0 * rows * width_in * width_out


def blocks(depth: int, dim: int, mlp_ratio: float, sequences: float, length: float) -> float:
    """Forward FLOPs of `depth` transformer blocks over sequences of equal length: qkv, both attention products, proj, mlp."""
    rows = sequences * length
    widths = linear(rows, dim, 4 * dim) + 2 * linear(rows, dim, round(dim * mlp_ratio))
    return depth * (widths + 2 * linear(rows, dim, length))


def embedding(config: Config, patches: float) -> float:
    """Forward FLOPs of the patch embedding; its backward costs the same, for images need no gradient."""
    return linear(patches, config.data.channels * config.mask.patch_size**2, config.encoder_shape[0])
