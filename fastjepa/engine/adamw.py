"""AdamW with the official parameter groups."""

import torch
from torch import nn

from fastjepa.engine.schedule import StepSettings


def build_adamw(encoder: nn.Module, predictor: nn.Module, pred_lr_scale: float = 1.0) -> torch.optim.AdamW:
    """Four groups in the official order: weights of the encoder and of the predictor, then their biases and 1-d parameters.

    Only the first two are decayed (the mask token, being 3-d, is among them); the predictor's two learn `pred_lr_scale`
    times as fast. The fused implementation steps all parameters in one pass and obeys a `found_inf` flag on the device.
    """
    networks = [(list(encoder.parameters()), 1.0), (list(predictor.parameters()), pred_lr_scale)]
    groups = [{"params": [p for p in params if (p.ndim > 1) == decayed], "decayed": decayed, "lr_scale": scale}
              for decayed in (True, False) for params, scale in networks]  # fmt: skip
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)


def apply_schedule(optimizer: torch.optim.Optimizer, now: StepSettings) -> None:
    for group in optimizer.param_groups:
        group["lr"] = now.lr * group["lr_scale"]
        group["weight_decay"] = now.weight_decay if group["decayed"] else 0.0
