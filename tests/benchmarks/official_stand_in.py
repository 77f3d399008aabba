"""Networks and optimizer with the interface of the official code, written over dense tensors."""

import numpy as np
import torch
from torch import Tensor, nn

from fastjepa.config.schema import MODELS
from fastjepa.masks.packed import Packed, full_sequences
from fastjepa.model.predictor import Predictor
from fastjepa.model.vit import Encoder


def flat(masks: list[Tensor], tokens: int) -> Tensor:
    """M (B, K) patch indices -> (M*B, K) flat rows, mask major."""
    return torch.cat([mask + tokens * torch.arange(len(mask))[:, None] for mask in masks])


class DenseEncoder(Encoder):
    def forward(self, images: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        if masks is None:
            return self.features(images)
        rows = flat(masks, self.grid[0] * self.grid[1])
        return super().forward(images, Packed.of(rows.flatten().numpy(), np.full(*rows.shape))).unflatten(0, rows.shape)

    def features(self, images: Tensor) -> Tensor:
        return super().forward(images).unflatten(0, (len(images), -1))


class DensePredictor(Predictor):
    def forward(self, x: Tensor, masks_x: list[Tensor], masks: list[Tensor]) -> Tensor:
        positions = self.predictor_pos_embed[0]
        seen = self.predictor_embed(x) + positions[torch.cat(masks_x)]  # (K*B, L, P)
        parts = [torch.cat((seen, (self.mask_token + positions[m]).repeat(len(masks_x), 1, 1)), dim=1) for m in masks]
        x = torch.cat(parts)
        b, length, _ = x.shape
        x = x.flatten(0, 1)
        for block in self.predictor_blocks:
            x = block(x, full_sequences(b, length))
        return self.predictor_proj(self.predictor_norm(x)).view(b, length, -1)[:, seen.shape[1] :]


class Paced:
    """A schedule that stays at its first value."""

    def __init__(self, optimizer: torch.optim.Optimizer, lr: float):
        self.optimizer, self.lr = optimizer, lr

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr


def init_model(device, patch_size, model_name, crop_size, pred_depth, pred_emb_dim) -> tuple[nn.Module, nn.Module]:
    grid = (crop_size // patch_size,) * 2
    dim, depth, heads, mlp_ratio = MODELS[model_name]
    encoder = DenseEncoder(grid, patch_size, 3, ((0.0,) * 3, (1.0,) * 3), (dim, depth, heads, mlp_ratio))
    return encoder, DensePredictor(grid, dim, (pred_emb_dim, pred_depth, heads))


def init_opt(encoder, predictor, start_lr, ref_lr, warmup, iterations_per_epoch, wd, **rest) -> tuple:
    parameters = [*encoder.parameters(), *predictor.parameters()]
    groups = [
        {"params": [p for p in parameters if (p.ndim > 1) == decayed], "weight_decay": decayed * wd} for decayed in (1, 0)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    first = start_lr + (ref_lr - start_lr) / (warmup * iterations_per_epoch)
    return optimizer, None, Paced(optimizer, first), Paced(optimizer, first)


def apply_masks(x: Tensor, masks: list[Tensor]) -> Tensor:
    return x.flatten(0, 1)[flat(masks, x.shape[1])]


def repeat_interleave_batch(x: Tensor, b: int, repeat: int) -> Tensor:
    return torch.cat([part.repeat(repeat, 1, 1) for part in x.split(b)])
