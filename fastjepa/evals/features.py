"""From a checkpoint and labelled images to features: load the encoder, decode as for evaluation, pool, cache."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastjepa.data.sources import Source
from fastjepa.errors import ConfigError
from fastjepa.evals.images import Augmentation, EvalImages, MeanStd, normalise_pixels
from fastjepa.evals.scoring import Features
from fastjepa.model.vit import choose_attention, use_attention
from fastjepa.weights.encoders import check_encoder_input

Layers = Literal["last", "concat4"]


def extract_features(
    encoder: nn.Module,
    source: Source,
    size: tuple[int, int],
    channels: int,
    mean_std: MeanStd,
    device: str | torch.device = "cpu",
    batch: int = 256,
    workers: int | None = None,
    rows: np.ndarray | None = None,
    dtype: torch.dtype = torch.float32,
    layers: Layers = "last",
    augment: Augmentation | None = None,
) -> Features:
    """Features of `source`: the mean over patches of the encoder's final-normed output, nothing on top.

    (n, D) of the last block or, with "concat4", (n, 4 D) of each of the last four (paper, appendix A.2).

    Args:
        size: (H, W) the images are brought to, a multiple of the patch.
        mean_std: per channel, on [0, 1].
        workers: decoding processes; default: none for few images and for pixels in memory, else up to 4.
        rows: the images to take, in this order; default: all, in the source's order.
        dtype: fp32, or bf16 for autocast.
        augment: what brings images to `size`; default: resized and cropped as usual for evaluation.

    Raises ConfigError when the encoder cannot take such images, or gives features that are not finite.
    """
    check_encoder_input(encoder, size, channels)
    encoder, device = encoder.to(device), torch.device(device)
    use_attention(encoder, choose_attention("auto", device, dtype))
    images, found = EvalImages(source, size, channels, rows, augment), []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        for pixels in images.batches(batch, workers):
            found.append(pooled_features(encoder, normalise_pixels(pixels.to(device), mean_std), layers).cpu())
    features = Features(torch.cat(found), images.labels())
    if not bool(features.x.isfinite().all()):
        raise ConfigError("the encoder gives features that are not finite: its weights are broken, use an earlier checkpoint")
    return features


def pooled_features(encoder: nn.Module, images: Tensor, layers: Layers = "last") -> Tensor:
    """(b, C, H, W) -> (b, D) or, for "concat4", (b, 4 D) fp32: patches averaged, blocks side by side, the last one last."""
    if layers == "last":
        return encoder.features(images).float().mean(dim=1)
    if len(encoder.blocks) < 4:
        raise ConfigError(f"--layers concat4: the encoder has {len(encoder.blocks)} blocks; use --layers last")
    outputs: list[Tensor] = []  # (b * N, D) each
    hooks = [block.register_forward_hook(lambda *call: outputs.append(call[-1])) for block in encoder.blocks[-4:]]
    try:
        encoder.features(images)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([encoder.norm(x).float().view(len(images), -1, x.shape[-1]).mean(dim=1) for x in outputs], dim=1)


def raw_pixels(
    source: Source,
    size: tuple[int, int],
    channels: int,
    mean_std: MeanStd,
    workers: int | None = None,
    rows: np.ndarray | None = None,
) -> Features:
    """The same images in the same order as in `extract`, normalised and flattened: (n, C * H * W)."""
    images = EvalImages(source, size, channels, rows)
    pixels = torch.cat([normalise_pixels(block, mean_std).flatten(1) for block in images.batches(1024, workers)])
    return Features(pixels, images.labels())
