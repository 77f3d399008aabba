"""A small network with weights unlike their initial values, random masks, and the loop over images it must equal."""

import math

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


def plain_turns(places: torch.Tensor, pairs: int) -> torch.Tensor:
    """Complex numbers (n, pairs) that turn the channel pairs of patches of the 4 x 4 grid: the row's, then the column's."""
    turns = torch.zeros(len(places), pairs, dtype=torch.complex64)
    for n, place in enumerate(places.tolist()):
        for axis, at in enumerate(divmod(place, 4)):
            for j in range(pairs // 2):
                angle = 2 * math.pi * ((at + 0.5) / 2 - 1) / 100 ** (j / (pairs // 2))
                turns[n, axis * pairs // 2 + j] = complex(math.cos(angle), math.sin(angle))
    return turns


def plain_block(block: Block, x: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
    """(1, n, D) through a block, written as the textbook does; with rotary positions where the places (n,) are given."""
    qkv = block.attn.qkv(block.norm1(x)).view(1, x.shape[1], 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = (
        part if norm is None else norm(part) for part, norm in zip(qkv[:2], (block.attn.q_norm, block.attn.k_norm), strict=True)
    )
    if places is not None:
        turns = plain_turns(places, q.shape[-1] // 2)
        q, k = (torch.complex(*part.chunk(2, dim=-1)) * turns for part in (q, k))
        q, k = (torch.cat((part.real, part.imag), dim=-1) for part in (q, k))
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
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
    rotary = encoder.form_of_blocks.rotary
    embedded = patches if rotary else patches + encoder.pos_embed
    features = {}
    for k in range(context_mask.shape[1]):
        for i in range(len(images)):
            there = torch.from_numpy(context_mask[i, k])
            x = embedded[i : i + 1, there]
            for block in encoder.blocks:
                x = plain_block(block, x, there.nonzero()[:, 0] if rotary else None)
            features[k, i] = encoder.norm(x)
    predictions = []
    for r in range(target_mask.shape[1]):
        for (k, i), seen in features.items():
            positions = torch.zeros(N, 1) if rotary else predictor.predictor_pos_embed[0]
            places = [torch.from_numpy(mask).nonzero()[:, 0] for mask in (context_mask[i, k], target_mask[i, r])]
            context = predictor.predictor_embed(seen) + positions[places[0]]
            hidden = predictor.mask_token + positions[places[1]]
            x = torch.cat((context, hidden), dim=1)
            for block in predictor.predictor_blocks:
                x = plain_block(block, x, torch.cat(places) if rotary else None)
            predictions.append(predictor.predictor_proj(predictor.predictor_norm(x[:, context.shape[1] :]))[0])
    return torch.cat(predictions), torch.cat([features[key][0] for key in features])
