"""A predictor that sees a part of the context, and a loss on visible patches: against a loop over images, draws and blocks."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastjepa.loader.batch import Batch
from fastjepa.loss.jepa_loss import jepa_loss
from fastjepa.loss.objective import choose_objective
from fastjepa.loss.regularizers import NoRegularizer
from fastjepa.masks.draw import draw_seen
from fastjepa.masks.layouts import Masking, Slots
from fastjepa.masks.packer import Packer
from fastjepa.model.jepa import build_pair
from tests.support.networks import perturbed, plain_block, plain_outputs, small

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
STEP = 7


def sparse():
    """Contexts of any patches, which may be targets too, and blocks of few: some patches are far from all of them."""
    random = np.random.default_rng(2)
    context, target = random.random((3, 2, 16)) < 0.6, random.random((3, 3, 16)) < 0.08
    context[:, :, 0] = target[:, :, 15] = True
    return context, target


def learned(config):
    jepa, target_encoder = (perturbed(network, seed) for seed, network in enumerate(build_pair(config)))
    packer, objective, drawn = Packer(Masking.of(config)), choose_objective(config.loss, NoRegularizer()), sparse()
    batch = Batch(IMAGES, *packer.pack_drawn(drawn, STEP, range(4, 7)), bad=())
    with torch.no_grad():
        target = objective.targets(target_encoder, batch)
    prediction, *_ = jepa(batch.images, batch.context, batch.blocks)
    loss = jepa_loss(prediction, target, batch.blocks, objective.distance, objective.normalization)
    loss.backward()
    return loss, [p.grad for p in jepa.parameters()]


def by_hand(config):
    jepa, target_encoder = (perturbed(network, seed) for seed, network in enumerate(build_pair(config)))
    (context, target), meta = sparse(), config.meta
    seen = draw_seen(context, meta.predictor_context, meta.predictor_repeats, Slots(config.runtime.seed, STEP, 4, 7))
    if meta.predictor_context == 1:
        assert np.array_equal(seen, context[:, None])
    joint, predictor, place = meta.predictor == "joint", jepa.predictor, np.arange(16)
    blocks = target.any(axis=1, keepdims=True) if joint else target
    total = 0.0
    for i, m, k, r in itertools.product(range(3), range(seen.shape[1]), range(2), range(blocks.shape[1])):
        with torch.no_grad():
            wanted = F.layer_norm(plain_outputs(target_encoder, IMAGES[i : i + 1])[-1][0], (32,))  # (N, D)
        x = (plain_outputs(jepa.encoder, IMAGES[i : i + 1])[0])[:, torch.from_numpy(context[i, k])]
        for block in jepa.encoder.blocks:
            x = plain_block(block, x)
        features = jepa.encoder.norm(x)[:, torch.from_numpy(seen[i, m, k][context[i, k]])]
        shown, hidden = (torch.from_numpy(np.flatnonzero(mask)) for mask in (seen[i, m, k], blocks[i, r]))
        positions = predictor.predictor_pos_embed[0]
        x = torch.cat((predictor.predictor_embed(features) + positions[shown],
                       predictor.mask_token + positions[hidden]), dim=1)  # fmt: skip
        for block in predictor.predictor_blocks:
            x = plain_block(block, x)
        said = predictor.predictor_proj(predictor.predictor_norm(x))[0]
        apart = F.smooth_l1_loss(said, wanted[torch.cat((shown, hidden))], reduction="none").mean(dim=1)
        even = target[i] / target[i].sum(axis=1, keepdims=True)  # (R, N): a patch's share of each block
        share = (even.mean(axis=0) if joint else even[r])[hidden.numpy()]
        total = total + (apart[len(shown) :] * torch.from_numpy(share).float()).sum()
        masked = place[target[i].any(axis=0)]
        for row, patch in zip(apart, shown.tolist(), strict=False):
            near = min(np.hypot(patch // 4 - other // 4, patch % 4 - other % 4) for other in masked)
            total = total + config.loss.visible_weight * row / len(shown) / max(near, 1.0) ** 0.5
    loss = total / (3 * seen.shape[1] * 2 * blocks.shape[1])
    loss.backward()
    return loss, [p.grad for p in jepa.parameters()]


@pytest.mark.parametrize("predictor", ["per_block", "joint"])
@pytest.mark.parametrize(("share", "repeats", "visible"), [(0.4, 1, 0.0), (0.3, 3, 0.0), (1.0, 1, 0.5), (0.5, 2, 0.7)])
@pytest.mark.parametrize("pred_depth", [1, 2])
def test_against_a_loop(pred_depth, share, repeats, visible, predictor):
    meta = {"predictor": predictor, "predictor_context": share, "predictor_repeats": repeats, "pred_depth": pred_depth}
    config = small(meta=meta, loss={"visible_weight": visible})
    (loss, gradients), (expected, theirs) = learned(config), by_hand(config)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for ours, plain in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=2e-6)
