"""The target encoder: an exponential moving average of the context encoder (paper, section 3)."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def update(target: nn.Module, online: nn.Module, momentum: float, finite: Tensor) -> None:
    """target <- momentum * target + (1 - momentum) * online, in fp32, where `finite` holds; nothing elsewhere.

    `finite` is a 0-dim bool tensor on the device: a skipped step is never read back by the host. The online weights
    must be finite, which a skipped optimizer step leaves them.
    """
    weight = (1.0 - momentum) * finite.float()
    for average, value in zip(target.parameters(), online.parameters(), strict=True):
        average.lerp_(value, weight)
