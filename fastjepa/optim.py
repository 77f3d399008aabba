"""AdamW with the official parameter groups."""

import torch
from torch import nn

from fastjepa.schedule import Now


def adamw(encoder: nn.Module, predictor: nn.Module) -> torch.optim.AdamW:
    """Four groups in the official order: weights of the encoder and of the predictor, then their biases and 1-d parameters.

    Only the first two are decayed (the mask token, being 3-d, is among them). The fused implementation steps all
    parameters in one pass and obeys a `found_inf` flag on the device.
    """
    networks = [list(network.parameters()) for network in (encoder, predictor)]
    groups = [{"params": [p for p in params if p.ndim > 1], "decayed": True} for params in networks]
    groups += [{"params": [p for p in params if p.ndim <= 1], "decayed": False} for params in networks]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)


def apply_schedule(optimizer: torch.optim.Optimizer, now: Now) -> None:
    for group in optimizer.param_groups:
        group["lr"] = now.lr
        group["weight_decay"] = now.weight_decay if group["decayed"] else 0.0
