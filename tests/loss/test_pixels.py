"""Pixels predicted beside targets: the plain sum of two losses, its gradient, and what is planned for it."""

import pytest
import torch
import torch.nn.functional as F

from fastjepa.errors import ConfigError
from fastjepa.loss.jepa_loss import jepa_loss
from fastjepa.loss.objective import beside_pixels, choose_objective
from fastjepa.loss.regularizers import NoRegularizer
from fastjepa.loss.targets import TARGETS
from fastjepa.model.jepa import build_pair
from fastjepa.plan.memory import RowCounts, activation_bytes
from fastjepa.plan.plan import workload_of
from tests.loss.test_targets import IMAGES, batch_of, queries
from tests.support.networks import perturbed, small

DISTANCES = {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss}


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("normalize", ["layer", "none"])
def test_the_loss_is_that_of_the_target_and_a_weighted_one_of_the_pixels(normalize: str, kind: str):
    config = small(loss={"pixel_weight": 0.7, "normalize": normalize, "kind": kind})
    encoder, batch = perturbed(build_pair(config)[1]), batch_of(config)
    objective = beside_pixels(choose_objective(config.loss, NoRegularizer()), 0.7, config.pixel_dim)
    with torch.no_grad():
        target = objective.targets(encoder, batch)
        features = TARGETS["output"](encoder, batch)[batch.blocks.target_rows]
    prediction = torch.randn(len(features), 32 + 3 * 8 * 8, requires_grad=True)
    loss = jepa_loss(prediction, target, batch.blocks, objective.distance, objective.normalization)

    mean, std = (torch.tensor(values)[:, None, None] for values in config.mean_std)
    pictures = (IMAGES / 255 - mean) / std
    patches = torch.stack([pictures[i, :, n // 4 * 8 :, n % 4 * 8 :][:, :8, :8].flatten() for i, n in queries()])
    patches = (patches - patches.mean(dim=1, keepdim=True)) / patches.std(dim=1, keepdim=True, correction=0)
    features = F.layer_norm(features, (32,)) if normalize == "layer" else features
    parts = zip(prediction.split((32, 192), dim=1), (features, patches), strict=True)
    apart = [
        (DISTANCES[kind](ours, theirs, reduction="none").mean(dim=1) * batch.blocks.weight).sum() for ours, theirs in parts
    ]
    expected = apart[0] + 0.7 * apart[1]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    found, right = (torch.autograd.grad(value, prediction, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-7)


def test_what_is_watched_for_a_collapse_are_the_features():
    config = small(loss={"pixel_weight": 1.0})
    encoder, batch = build_pair(config)[1], batch_of(config)
    targets = beside_pixels(choose_objective(config.loss, NoRegularizer()), 1.0, config.pixel_dim).targets
    found = targets(encoder, batch)
    assert torch.equal(targets.watched(found, torch.zeros(1, 32)), TARGETS["output"](encoder, batch))


def test_pixels_count_in_the_predictor_and_in_what_its_loss_holds():
    """Beside the features: a prediction and its gradient for each query, and a target for each row, 192 numbers of 4 bytes."""
    with_pixels, without = small(loss={"pixel_weight": 1.0}), small()
    parameters = [sum(p.numel() for p in build_pair(c)[0].parameters()) for c in (with_pixels, without)]
    assert parameters[0] - parameters[1] == 192 * (24 + 1)
    rows = RowCounts(context=5, target=7, sequences=30, queries=11)
    held = [activation_bytes(workload_of(c), rows).loss for c in (with_pixels, without)]
    assert held[0] - held[1] == 4 * 192 * (2 * 11 + 7)


def test_no_weight_is_no_pixels():
    config = small(loss={"pixel_weight": 0.0})
    assert config.pixel_dim == 0 and config.predicted_dim == 32


def test_pixels_are_not_predicted_twice():
    with pytest.raises(ConfigError, match="loss.pixel_weight: the pixels are what loss.target pixels predicts already"):
        small(loss={"pixel_weight": 1.0, "target": "pixels"})
