"""A small network with weights unlike their initial values, random masks, and the loop over images it must equal."""

import numpy as np
import torch
from torch.nn import functional as F

from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import Config
from fastjepa.model.jepa import Jepa
from fastjepa.model.vit import Block

N = 16


def small(**sections) -> Config:
    meta = {"model_name": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 4, "pred_depth": 2, "pred_emb_dim": 24}
    base = {"data": {"crop_size": 32}, "mask": {"patch_size": 8}, "meta": meta, "runtime": {"dtype": "fp32"}}
    return config_from_dict({name: base.get(name, {}) | sections.get(name, {}) for name in base | sections})


def perturbed(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Zero biases and unit norms would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def masks(b: int = 3, k: int = 2, r: int = 3, seed: int = 0):
    """Ragged context masks and target blocks."""
    random = np.random.default_rng(seed)
    context, target = (random.random((b, count, N)) < 0.5 for count in (k, r))
    context[:, :, 0] = target[:, :, 1] = True
    return context, target


def plain_block(block: Block, x: torch.Tensor) -> torch.Tensor:
    """(1, n, D) through a block, written as the textbook does."""
    qkv = block.attn.qkv(block.norm1(x)).view(1, x.shape[1], 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = (qkv[0] @ qkv[1].transpose(-2, -1) * qkv.shape[-1] ** -0.5).softmax(-1)
    x = x + block.attn.proj((weights @ qkv[2]).transpose(1, 2).flatten(2))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def plain_outputs(encoder, image: torch.Tensor) -> list[torch.Tensor]:
    """(1, N, D) of a whole image (1, C, H, W) after the embedding, after each block, and after the final norm."""
    weight, bias = encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias
    found = [F.conv2d(image, weight, bias, stride=8).flatten(2).transpose(1, 2) + encoder.pos_embed]
    for block in encoder.blocks:
        found.append(plain_block(block, found[-1]))
    return [*found, encoder.norm(found[-1])]


def plain_jepa(jepa: Jepa, images, context_mask, target_mask):
    """Predictions of a per-image loop in the official order, and the context features."""
    encoder, predictor = jepa.encoder, jepa.predictor
    patches = (
        F.conv2d(images, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias, stride=8).flatten(2).transpose(1, 2)
    )
    embedded = patches + encoder.pos_embed
    features = {}
    for k in range(context_mask.shape[1]):
        for i in range(len(images)):
            x = embedded[i : i + 1, torch.from_numpy(context_mask[i, k])]
            for block in encoder.blocks:
                x = plain_block(block, x)
            features[k, i] = encoder.norm(x)
    predictions = []
    for r in range(target_mask.shape[1]):
        for (k, i), seen in features.items():
            positions = predictor.predictor_pos_embed[0]
            context = predictor.predictor_embed(seen) + positions[torch.from_numpy(context_mask[i, k])]
            hidden = predictor.mask_token + positions[torch.from_numpy(target_mask[i, r])]
            x = torch.cat((context, hidden), dim=1)
            for block in predictor.predictor_blocks:
                x = plain_block(block, x)
            predictions.append(predictor.predictor_proj(predictor.predictor_norm(x[:, context.shape[1] :]))[0])
    return torch.cat(predictions), torch.cat([features[key][0] for key in features])
