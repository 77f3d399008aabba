"""Pooled features of labelled images, made by an encoder, and raw pixels in their place."""

from typing import Literal

import torch
from torch import Tensor, nn

from fastjepa.data.pixels import MeanStd, normalise_pixels
from fastjepa.engine.precision import autocast_of
from fastjepa.errors import UserError
from fastjepa.evals.images import EvalImages
from fastjepa.evals.scoring import Features
from fastjepa.model.vit import use_auto_attention

Layers = Literal["last", "concat4"]
FORWARD_BATCH, PIXEL_BATCH = 256, 1024  # images of one forward pass; images that are decoded and flattened together


def extract_features(
    encoder: nn.Module,
    images: EvalImages,
    mean_std: MeanStd,
    layers: Layers = "last",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Features:
    """Return features of `images`: the mean over patches of the encoder's final-normed output, nothing on top.

    (n, D) of the last block or, with "concat4", (n, 4 D) of each of the last four (paper, appendix A.2).

    Args:
        images: in the size that the encoder sees, a multiple of the patch.
        mean_std: per channel, as `normalise_pixels` takes them.
        dtype: fp32, or bf16 for autocast.

    Raises UserError when the encoder cannot take such images, or gives features that are not finite.
    """
    check_encoder_input(encoder, images.size, images.pixels.channels)
    encoder, device, found = encoder.to(device), torch.device(device), []
    use_auto_attention(encoder, device, dtype)
    with torch.inference_mode(), autocast_of(dtype, device):
        for pixels in images.batches(FORWARD_BATCH):
            found.append(pooled_features(encoder, normalise_pixels(pixels.to(device), mean_std), layers).cpu())
    features = Features(torch.cat(found), images.labels())
    if not bool(features.x.isfinite().all()):
        raise UserError("the encoder gives features that are not finite: its weights are broken, use an earlier checkpoint")
    return features


def check_encoder_input(encoder: nn.Module, size: tuple[int, int], channels: int) -> None:
    """Raise UserError when `encoder` cannot take (channels, *size) images."""
    _, takes, height, width = encoder.get_parameter("patch_embed.proj.weight").shape
    if takes != channels:
        raise UserError(f"the encoder takes {takes}-channel images, not {channels}: set data.channels to {takes}")
    if size[0] % height or size[1] % width:
        raise UserError(f"images of {size[0]}x{size[1]} pixels do not divide into {height}x{width} patches: choose a multiple")


def pooled_features(encoder: nn.Module, images: Tensor, layers: Layers = "last") -> Tensor:
    """Return fp32 features (b, D) of images (b, C, H, W) or, for "concat4", (b, 4 D) of four blocks, the last one last."""
    if layers == "last":
        return encoder.features(images).float().mean(dim=1)
    if len(encoder.blocks) < 4:
        raise UserError(f"--layers concat4: the encoder has {len(encoder.blocks)} blocks; use --layers last")
    outputs: list[Tensor] = []  # (b * N, D) each
    hooks = [block.register_forward_hook(lambda *call: outputs.append(call[-1])) for block in encoder.blocks[-4:]]
    try:
        encoder.features(images)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([encoder.norm(x).float().view(len(images), -1, x.shape[-1]).mean(dim=1) for x in outputs], dim=1)


def raw_pixels(images: EvalImages, mean_std: MeanStd) -> Features:
    """Return the images themselves, normalised and flattened: (n, C * H * W)."""
    blocks = images.batches(PIXEL_BATCH)
    return Features(torch.cat([normalise_pixels(block, mean_std).flatten(1) for block in blocks]), images.labels())
