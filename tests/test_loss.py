"""The loss against a per-block loop; the regularizer over a batch in pieces against the batch whole."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastjepa.config import LossConfig
from fastjepa.loss import BatchRegularizer, jepa_loss, pool, regularizer
from fastjepa.packing import Packed, pack


@pytest.mark.parametrize(("kind", "distance"), [("smooth_l1", F.smooth_l1_loss), ("l2", F.mse_loss)])
def test_mean_over_images_of_the_mean_over_blocks_of_unequal_size(kind, distance):
    target_mask = np.zeros((2, 2, 9), dtype=bool)
    for (image, block), patches in {(0, 0): [0, 1], (0, 1): [1, 2, 3, 4], (1, 0): [5], (1, 1): [6, 7, 8]}.items():
        target_mask[image, block, patches] = True
    _, target, blocks = pack(np.ones((2, 1, 9), dtype=bool), target_mask)
    features = torch.randn(2 * 9, 6) * 3
    prediction = torch.randn(len(blocks.target_rows), 6)
    normal = F.layer_norm(features, (6,))

    expected, at = 0, 0
    for block in range(2):
        for image in range(2):
            rows = image * 9 + np.flatnonzero(target_mask[image, block])
            expected += distance(prediction[at : at + len(rows)], normal[rows]) / 4
            at += len(rows)
    torch.testing.assert_close(jepa_loss(prediction, features[target.idx.long()], blocks, kind), expected)


def test_autocast_leaves_the_loss_in_fp32():
    mask = np.ones((4, 1, 9), dtype=bool)
    _, _, blocks = pack(mask, mask)
    prediction, features = torch.randn(36, 6), torch.randn(36, 6)
    exact = jepa_loss(prediction, features, blocks)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(jepa_loss(prediction, features, blocks), exact)


def test_pool_is_the_mean_of_each_sequence():
    x = torch.randn(5, 3)
    pooled = pool(x, Packed.of(np.arange(5), np.array([2, 3])))
    torch.testing.assert_close(pooled, torch.stack((x[:2].mean(0), x[2:].mean(0))))


def test_vicreg_is_lightlys():
    from lightly.loss.vicreg_loss import VICRegLoss

    x = torch.randn(32, 8) * 0.5
    term = regularizer(LossConfig(regularizer="vicreg", regularizer_weight=0.1, covariance_weight=0.04))
    # VICRegLoss halves nothing in the covariance and averages the two views' variance: equal views make both plain.
    variance = VICRegLoss(lambda_param=0, mu_param=1, nu_param=0)(x, x)
    covariance = VICRegLoss(lambda_param=0, mu_param=0, nu_param=1)(x, x)
    torch.testing.assert_close(term(x), 0.1 * (variance + 0.04 * covariance / 2))


@pytest.mark.parametrize(("world", "pieces"), [(1, 1), (1, 4), (2, 1), (2, 2)])
def test_gradients_of_the_pieces_add_up_to_the_whole(world, pieces):
    term = regularizer(LossConfig(regularizer="vicreg"))
    x = torch.randn(16, 6)
    whole = x.clone().requires_grad_()
    term(whole).backward()

    parts = [part.clone().requires_grad_() for part in x.chunk(world * pieces)]
    for rank in range(world):
        spread = BatchRegularizer(term, pieces, lambda mine: x, rank, world)
        mine = parts[rank * pieces : (rank + 1) * pieces]
        if pieces > 1:
            spread.survey([part.detach() for part in mine])
        for part in mine:
            value = spread(part)
            (value / world).backward()  # DDP averages over ranks
        torch.testing.assert_close(spread.value, term(x))
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), whole.grad)
