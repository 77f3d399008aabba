"""The target encoder: an exponential moving average of the context encoder (paper, section 3)."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastjepa_kernels import ema_table, ema_update_

_tables = WeakKeyDictionary()  # target network -> where its tensors lie, for the one launch that moves them all


@torch.no_grad()
def update(target: nn.Module, online: nn.Module, momentum: float, finite: Tensor) -> None:
    """target <- momentum * target + (1 - momentum) * online, in fp32, where `finite` holds; nothing elsewhere.

    `finite` is a 0-dim bool tensor on the device: a skipped step is never read back by the host. The online weights
    must be finite, which a skipped optimizer step leaves them.
    """
    averages, values = list(target.parameters()), list(online.parameters())
    if averages[0].is_cuda and target not in _tables:
        _tables[target] = ema_table(averages, values)
    ema_update_(averages, values, momentum, finite, table=_tables.get(target))
