"""Targets of several layers: against a loop over images, blocks and layers; and what is not run for them."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastjepa.errors import ConfigError
from fastjepa.loader.batch import Batch
from fastjepa.loss.jepa_loss import jepa_loss
from fastjepa.loss.objective import choose_objective
from fastjepa.loss.regularizers import NoRegularizer
from fastjepa.masks.layouts import Masking
from fastjepa.masks.pack import pack
from fastjepa.masks.packings import SEPARATE
from fastjepa.model.jepa import build_pair
from tests.support.networks import masks, perturbed, plain_jepa, plain_outputs, small

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
DEPTH = {"depth": 4, "pred_depth": 2}
NORMAL = {  # of (rows, D)
    "layer": lambda rows: F.layer_norm(rows, rows.shape[1:]),
    "none": lambda rows: rows,
    "batch": lambda rows: F.batch_norm(rows, None, None, training=True),
}


def learned(config) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """The loss, the gradients and the features that are watched of one micro-batch."""
    jepa, target_encoder = (perturbed(network, seed) for seed, network in enumerate(build_pair(config)))
    objective = choose_objective(config.loss, NoRegularizer())
    batch = Batch(IMAGES, *pack(*masks(), packing=Masking.of(config).packing), bad=())
    with torch.no_grad():
        target = objective.targets(target_encoder, batch)
    prediction, context, _ = jepa(batch.images, batch.context, batch.blocks)
    loss = jepa_loss(prediction, target, batch.blocks, objective.distance, objective.normalization)
    loss.backward()
    return loss, [p.grad for p in jepa.parameters()], objective.targets.watched(target, context)


def by_hand(config) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same of plain PyTorch: image by image, block by block, layer by layer."""
    jepa, target_encoder = (perturbed(network, seed) for seed, network in enumerate(build_pair(config)))
    jepa, (context, target) = copy.deepcopy(jepa), masks()
    prediction, _ = plain_jepa(jepa, IMAGES, context, target)
    normal = NORMAL[config.loss.normalize]
    with torch.no_grad():
        outputs = [plain_outputs(target_encoder, image[None]) for image in IMAGES]
        union = torch.from_numpy(target.any(axis=1))  # (b, N): the rows that count in a mean over the batch
        layers = []
        for number in config.loss.target_layers:
            rows = torch.cat([found[number][0] for found in outputs])  # (b * N, D)
            whole = torch.zeros_like(rows)
            whole[union.flatten()] = normal(rows[union.flatten()])
            layers.append(whole)
        if config.loss.layers == "mean":
            mean = sum(layers) / len(layers)
            whole = torch.zeros_like(mean)
            whole[union.flatten()] = normal(mean[union.flatten()])
            layers = [whole]
    distance = F.smooth_l1_loss if config.loss.kind == "smooth_l1" else F.mse_loss
    loss, at, count = 0.0, 0, target.shape[1] * context.shape[1] * len(IMAGES)
    for r, _, i in itertools.product(range(target.shape[1]), range(context.shape[1]), range(len(IMAGES))):
        patches = i * 16 + torch.from_numpy(np.flatnonzero(target[i, r]))
        said = prediction[at : at + len(patches)].split(32, dim=1)
        loss = loss + sum(map(distance, said, [rows[patches] for rows in layers])) / len(layers) / count
        at += len(patches)
    loss.backward()
    return loss, [p.grad for p in jepa.parameters()]


@pytest.mark.parametrize("layers", ["each", "mean"])
@pytest.mark.parametrize(
    ("normalize", "kind"), [("layer", "smooth_l1"), ("layer", "l2"), ("none", "smooth_l1"), ("batch", "l2")]
)
@pytest.mark.parametrize("numbers", [(1, 4), (2, 3)])
def test_layers_against_a_loop_over_images_blocks_and_layers(numbers, normalize, kind, layers):
    keys = {"target_layers": list(numbers), "layers": layers, "normalize": normalize, "kind": kind}
    config = small(meta=DEPTH, loss=keys)
    loss, gradients, watched = learned(config)
    expected, theirs = by_hand(config)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for ours, plain in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    assert watched.shape[1] == 32


def test_a_block_that_is_seen_alone_has_layers_too():
    config = small(meta=DEPTH, loss={"target": "input", "target_layers": [1, 3]})
    _, encoder = build_pair(config)
    batch = Batch(IMAGES, *pack(*masks(), packing=SEPARATE), bad=())
    found = choose_objective(config.loss, NoRegularizer()).targets(perturbed(encoder), batch)
    last = encoder(IMAGES, batch.target, layers=(4,))[0]
    torch.testing.assert_close(encoder.norm(last), encoder(IMAGES, batch.target))
    assert [rows.shape for rows in found] == [(len(batch.target.idx), 32)] * 2


def test_no_block_after_the_last_layer_is_run_and_that_one_finishes_what_is_wanted_alone(monkeypatch):
    _, encoder = build_pair(small(meta=DEPTH))
    _, target, _ = pack(*masks())
    rows = []
    for block in encoder.blocks:
        block.mlp.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    encoder(IMAGES, wanted=target, layers=(1, 3))
    assert rows == [48, 48, len(target.idx)]
    rows.clear()
    encoder(IMAGES, wanted=target)
    assert rows == [48, 48, 48, len(target.idx)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target_layers": [2, 5]}, "loss.target_layers: 5 is no block of an encoder of 4; name blocks from 1 to 4"),
        ({"target_layers": [2, 2]}, "loss.target_layers: .* must be last or rising block numbers"),
        ({"target_layers": [3, 2]}, "loss.target_layers: .* must be last or rising block numbers"),
        ({"target_layers": [0, 2]}, "loss.target_layers: .* must be last or rising block numbers"),
        ({"target_layers": []}, "loss.target_layers: .* must be last or rising block numbers"),
        ({"target_layers": "first"}, "loss.target_layers: 'first' must be last or a list of a whole number"),
        ({"layers": "mean"}, "loss.layers: mean means nothing to loss.target_layers last"),
        ({"target": "pixels", "target_layers": [1]}, "loss.target_layers: loss.target pixels has no target network"),
    ],
)
def test_layers_that_cannot_be_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        small(meta=DEPTH, loss=keys)
