"""AdamW with the official parameter groups."""

import torch
from torch import nn

from fastjepa.engine.schedule import StepSettings
from fastjepa_kernels.layers import FusedAdamWEMA

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # the state of a parameter
MUON_MOMENTS = ("momentum_buffer",)  # of one that Muon steps
ADAMW = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}  # the schedule sets lr and decay at each step


def parameter_groups(encoder: nn.Module, predictor: nn.Module, pred_lr_scale: float = 1.0) -> list[dict]:
    """Return four groups in the official order: weights of encoder and predictor, then their biases and 1-d parameters.

    Only the first two are decayed (the mask token, being 3-d, is among them); the predictor's two learn `pred_lr_scale`
    times as fast.
    """
    networks = [(list(encoder.parameters()), 1.0), (list(predictor.parameters()), pred_lr_scale)]
    return [{"params": [p for p in params if (p.ndim > 1) == decayed], "decayed": decayed, "lr_scale": scale}
            for decayed in (True, False) for params, scale in networks]  # fmt: skip


def build_adamw(encoder: nn.Module, predictor: nn.Module, pred_lr_scale: float = 1.0) -> torch.optim.AdamW:
    """Return torch's AdamW, whose fused kernel steps all parameters in one pass and obeys a `found_inf` flag on the device."""
    return torch.optim.AdamW(parameter_groups(encoder, predictor, pred_lr_scale), **ADAMW, fused=True)


def build_adamw_ema(
    encoder: nn.Module, predictor: nn.Module, target_encoder: nn.Module, pred_lr_scale: float = 1.0
) -> FusedAdamWEMA:
    """Return AdamW that also moves the target encoder, in one pass; its moments are there from the start, at zero.

    Moments and counts have the names and shapes of torch's AdamW, so that checkpoints are the same.
    """
    pairs = zip(encoder.parameters(), target_encoder.parameters(), strict=True)
    optimizer = FusedAdamWEMA(parameter_groups(encoder, predictor, pred_lr_scale), **ADAMW, targets=pairs)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        number: {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        | {"step": torch.zeros((), device=p.device)}
        for number, p in enumerate(parameters)
    }
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return optimizer


def moment_names(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, tuple[str, ...]]:
    """Return the names of each parameter's state."""
    return {p: MUON_MOMENTS if group.get("muon") else MOMENTS for group in optimizer.param_groups for p in group["params"]}


def apply_schedule(optimizer: torch.optim.Optimizer, now: StepSettings) -> None:
    """Set the learning rate and weight decay of every group."""
    for group in optimizer.param_groups:
        lr, decay = (now.muon_lr, now.muon_weight_decay) if group.get("muon") else (now.lr, now.weight_decay)
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = decay if group["decayed"] else 0.0
