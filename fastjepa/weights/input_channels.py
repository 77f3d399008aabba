"""Patch embeddings for images of another number of channels than they were trained on."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastjepa.errors import ConfigError

EMBEDDING = "patch_embed.proj.weight"  # (D, C, p, p)


def adapted_encoder(weights: Mapping[str, Tensor], channels: int, where: str) -> tuple[Mapping[str, Tensor], str | None]:
    """Return an encoder's weights for images of `channels` channels, and a sentence where that changed them.

    ConfigError, which names the file `where`, for another number than three that differs from `channels`.
    """
    takes = weights[EMBEDDING].shape[1] if EMBEDDING in weights else channels  # without it they are refused as a whole
    if takes == channels:
        return weights, None
    if takes != 3:
        raise ConfigError(f"{where}: its encoder takes images of {takes} channels, and data.channels is {channels}; only one "
                          f"of 3 is adapted to other numbers: set data.channels to {takes}, or start without it")  # fmt: skip
    how = "summed over the 3" if channels == 1 else f"repeated for {channels} and scaled by 3/{channels}"
    said = f"their patch embedding is of 3 channels and data.channels is {channels}: its weights are {how}, as timm does"
    return {**weights, EMBEDDING: adapted_embedding(weights[EMBEDDING], channels)}, said


def adapted_embedding(weight: Tensor, channels: int) -> Tensor:
    """Return a patch embedding (D, 3, p, p) for `channels` channels, (D, channels, p, p), as timm adapts it.

    One channel takes the sum, so that a grey image gives what it gave as three equal channels. Of N channels, channel c takes
    the weights of c % 3 times 3 / N: of 4 channels those of 0 1 2 0, times 3/4.
    """
    if channels == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    return (weight.float()[:, torch.arange(channels) % 3] * (3 / channels)).to(weight.dtype)
