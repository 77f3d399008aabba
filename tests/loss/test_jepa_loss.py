"""The loss against a per-block loop; the regularizer over a batch in pieces against the batch whole."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastjepa.errors import UserError
from fastjepa.loss.jepa_loss import jepa_loss
from fastjepa.loss.normalizations import NORMALIZATIONS, standardised_layers
from fastjepa.loss.regularizers import (
    BatchRegularizer,
    covariance_penalty,
    regularizer_term,
    variance_hinge,
)
from fastjepa.masks.pack import pack
from fastjepa.masks.packed import Packed
from fastjepa.model.projector import pool_sequences
from fastjepa.ranks.collectives import reductions_begun
from fastjepa.ranks.world import World, join_world, leave_world
from tests.support import ranks


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
    pooled = pool_sequences(x, Packed.of(np.arange(5), np.array([2, 3])))
    torch.testing.assert_close(pooled, torch.stack((x[:2].mean(0), x[2:].mean(0))))


def test_vicreg_is_lightlys():
    from lightly.loss.vicreg_loss import VICRegLoss

    x = torch.randn(32, 8) * 0.5
    term = regularizer_term("vicreg", 0.1, 0.04)
    # VICRegLoss halves nothing in the covariance and averages the two views' variance: equal views make both plain.
    variance = VICRegLoss(lambda_param=0, mu_param=1, nu_param=0)(x, x)
    covariance = VICRegLoss(lambda_param=0, mu_param=0, nu_param=1)(x, x)
    torch.testing.assert_close(term(x, 0), 0.1 * (variance + 0.04 * covariance / 2))


@pytest.mark.parametrize("deviation", [0.3, 1.5])
def test_vicregs_terms_and_gradients_are_lightlys(deviation):
    from lightly.loss.vicreg_loss import covariance_loss, variance_loss

    x = (torch.randn(24, 96) * deviation + 3).requires_grad_()
    for ours, theirs in ((variance_hinge, variance_loss), (covariance_penalty, covariance_loss)):
        pairs = [(out, *torch.autograd.grad(out, x)) for out in (ours(x), theirs(x))]
        torch.testing.assert_close(*pairs, rtol=1e-6, atol=1e-7)


def test_vicreg_needs_no_lightly(monkeypatch):
    for module in ("lightly", "lightly.loss", "lightly.loss.lejepa_loss"):
        monkeypatch.setitem(sys.modules, module, None)
    assert regularizer_term("vicreg", 0.1, 0.04)(torch.randn(4, 3), 0).isfinite()
    for name in ("sigreg", "visreg"):
        with pytest.raises(UserError, match=f"{name} needs lightly"):
            regularizer_term(name, 0.1, 0.04)


def sigreg(weight: float = 1.0, seed: int = 0):
    return regularizer_term("sigreg", weight, 0.0, seed)


def test_sigreg_is_the_distance_of_projections_to_a_gaussian():
    """Against the statistic of Epps and Pulley in closed form for one feature, whose projections are itself or its mirror.

    Over all frequencies with a Gaussian weight it is a mean over pairs; the term stops at 3, where the weight is e^-4.5.
    """
    x = torch.randn(64, 1) * 2 + 0.5
    n, apart = len(x), x - x.T
    pairs = (-(apart**2) / 2).exp().sum() / n - 2**0.5 * (-(x**2) / 4).exp().sum() + n / 3**0.5
    assert float(sigreg()(x, 0)) == pytest.approx(float((2 * torch.pi) ** 0.5 * pairs), rel=0.02)
    assert float(sigreg(0.1)(x, 0)) == pytest.approx(0.1 * float(sigreg()(x, 0)))


def test_sigreg_tells_a_gaussian_from_a_collapse():
    gaussian = torch.randn(512, 8)
    assert float(sigreg()(gaussian, 0)) < 3
    for collapsed in (torch.zeros(512, 8), gaussian * 0.1, gaussian[:, :1].expand(-1, 8), gaussian + 2):
        assert float(sigreg()(collapsed, 0)) > 30


def test_visreg_is_scale_and_centre_and_the_quantiles_of_a_gaussian():
    """For one feature, whose projections are itself or its mirror; a collapse has a gradient, where sigreg's is gone."""
    x = torch.randn(64, 1) * 2 + 0.5
    term = regularizer_term("visreg", 1.0, 0.0)
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf(torch.arange(1, 65) / 65)
    normal = ((x - x.mean()) / (x.std(correction=0) + 1e-4)).flatten()
    shape = torch.stack([(sign * normal).sort().values - quantiles for sign in (1, -1)]).square().mean()
    expected = (1 - x.std(correction=0)) ** 2 + x.mean() ** 2 + shape
    assert float(term(x, 0)) == pytest.approx(float(expected), rel=0.02)
    faint = (1e-3 * torch.randn(64, 8)).requires_grad_()
    assert torch.autograd.grad(term(faint, 0), faint)[0].norm() > 0.1
    third, again, fourth = (float(term(faint.detach(), step)) for step in (3, 3, 4))
    assert third == again != fourth


def test_projections_are_a_function_of_seed_and_step_and_touch_no_generator():
    x = torch.randn(32, 8)
    state = torch.get_rng_state()
    first = [float(sigreg(seed=seed)(x, step)) for seed in (0, 1) for step in (0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert [float(sigreg(seed=seed)(x, step)) for seed in (0, 1) for step in (0, 1)] == first
    assert len(set(first)) == 4


@pytest.mark.parametrize("kind, distance", [("smooth_l1", F.smooth_l1_loss), ("l2", F.mse_loss)])
def test_targets_as_they_are_or_standardised_over_the_batch(kind, distance):
    """One block over all patches: the loss is the plain mean; `layer` is the fused kernel's, tested above."""
    mask = np.ones((4, 1, 9), dtype=bool)
    _, _, blocks = pack(mask, mask)
    prediction, features = torch.randn(36, 6, requires_grad=True), torch.randn(36, 6) * 3 + 1
    over_rows = F.batch_norm(features, None, None, training=True)
    for normalize, target in (("none", features), ("batch", over_rows)):
        found, expected = jepa_loss(prediction, features, blocks, kind, NORMALIZATIONS[normalize]), distance(prediction, target)
        torch.testing.assert_close(found, expected)
        grads = (torch.autograd.grad(value, prediction)[0] for value in (found, expected))
        torch.testing.assert_close(*grads)


def standardise_together() -> None:
    place = join_world("cpu", timeout=240)
    rows = torch.randn(36, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1
    mine = slice(0, 10) if place.rank == 0 else slice(10, 36)  # ranks have different numbers of targets
    layers, before = (rows, rows.flip(1).exp()), reductions_begun()
    found = standardised_layers([[layer[mine][:4], layer[mine][4:]] for layer in layers])  # of two micro-batches
    assert reductions_begun() - before == 2  # however many layers there are
    for pieces, layer in zip(found, layers, strict=True):
        torch.testing.assert_close(torch.cat(pieces), F.batch_norm(layer, None, None, training=True)[mine])
    leave_world()


def test_ranks_standardise_their_targets_together():
    ranks.run(standardise_together)


@pytest.mark.parametrize("name", ["vicreg", "sigreg", "visreg"])
@pytest.mark.parametrize(("world", "pieces"), [(1, 1), (1, 4), (2, 1), (2, 2)])
def test_gradients_of_the_pieces_add_up_to_the_whole(world, pieces, name):
    term = regularizer_term(name, 0.1, 0.04)
    x = torch.randn(16, 6)
    whole = x.clone().requires_grad_()
    term(whole, 3).backward()

    parts = [part.clone().requires_grad_() for part in x.chunk(world * pieces)]
    for rank in range(world):
        spread = BatchRegularizer(term, pieces, World(rank, rank, world, x.device), gather=lambda mine: x)
        spread.step = 3
        mine = parts[rank * pieces : (rank + 1) * pieces]
        if pieces > 1:
            spread.survey([part.detach() for part in mine])
        for part in mine:
            (spread(part) / world).backward()  # DDP averages over ranks
        torch.testing.assert_close(spread.value, term(x, 3))
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), whole.grad)
