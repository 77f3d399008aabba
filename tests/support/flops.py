"""FLOPs counted by torch on a loop over images, which the formulas must equal."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import Config
from fastjepa.loader.batch import Batch
from fastjepa.loss.objective import choose_objective
from fastjepa.loss.regularizers import NoRegularizer
from fastjepa.masks.draw import draw_masks
from fastjepa.masks.layouts import Masking
from fastjepa.masks.pack import pack
from fastjepa.masks.packed import Blocks, Packed
from fastjepa.model.jepa import build_pair
from fastjepa.model.vit import Encoder, use_attention
from fastjepa.plan.flops import Flops


def tiny(depth: int = 3, pred_depth: int = 3, images: int = 2, **mask: object) -> Config:
    """A network of few rows, in which no width equals another, so that no product can stand for another."""
    return config_from_dict(
        {
            "data": {"crop_size": [24, 32], "batch_size": images, "channels": 1},
            "mask": {"patch_size": 4, "min_keep": 2, **mask},
            "meta": {"embed_dim": 48, "depth": depth, "num_heads": 4, "pred_depth": pred_depth, "pred_emb_dim": 32},
            "runtime": {"dtype": "fp32", "device": "cpu", "attention": "matmul"},
        }
    )


def loop(q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed, way: str) -> Tensor:
    """Attention a sequence at a time: no row of padding is ever counted."""
    ends = [packed.cu_seqlens.tolist() for packed in (queries, keys)]
    parts = []
    for q0, q1, k0, k1 in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
        one_q, one_k, one_v = (x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        parts.append(((one_q @ one_k.mT).softmax(-1) @ one_v).transpose(0, 1))
    return torch.cat(parts)


def counted(config: Config, context: Packed, target: Packed, blocks: Blocks, teacher: Encoder | None = None) -> Flops:
    """Return what FlopCounterMode sees of each part, per image."""
    jepa, target_encoder = build_pair(config)
    for network in (jepa, target_encoder):
        use_attention(network, "matmul")
    b = config.micro_batch
    images = torch.randn(b, config.data.channels, *config.image_size)
    parts = []

    def spent(run) -> Tensor:
        with FlopCounterMode(display=False) as counter:
            result = run()
        parts.append(counter.get_total_flops() / b)
        return result

    targets = choose_objective(config.loss, NoRegularizer(), None, teacher).targets
    with torch.no_grad():
        spent(lambda: targets(target_encoder, Batch(images, context, target, blocks, bad=())))
    features = spent(lambda: jepa.encoder(images, context))
    spent(lambda: features.sum().backward())
    features = features.detach().requires_grad_()
    said = spent(lambda: (jepa.predictor(features, context, blocks), jepa.pooled(features, context)))
    spent(lambda: sum(x.sum() for x in said if x is not None).backward())
    return Flops(*parts)


def assert_close(found: Flops, expected: Flops, relative: float = 0.01) -> None:
    assert dataclasses.asdict(found) == pytest.approx(dataclasses.asdict(expected), rel=relative)


def draw(config: Config, step: int = 0) -> tuple[np.ndarray, np.ndarray]:
    images = config.data.batch_size
    return draw_masks(Masking.of(config), step, range(images), images)


def lengths(context: int, block: int, union: int, contexts: int, blocks: int, images: int) -> tuple[Packed, Packed, Blocks]:
    """Masks of given lengths: a context, `blocks` blocks of one length, and an exact union of them."""
    context_mask, target_mask = np.zeros((images, contexts, 48), bool), np.zeros((images, blocks, 48), bool)
    context_mask[:, :, 48 - context :] = True
    for r in range(blocks):
        start = (union - block) * r // max(1, blocks - 1)
        target_mask[:, r, start : start + block] = True
    return pack(context_mask, target_mask)
