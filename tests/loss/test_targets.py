"""Targets: the target network's output, its output on a block alone, or pixels; each against its plain definition."""

import numpy as np
import pytest
import torch

from fastjepa.engine.average import Average
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.schedule import StepSettings
from fastjepa.errors import ConfigError
from fastjepa.loader.batch import Batch
from fastjepa.loss.targets import TARGETS
from fastjepa.masks.layouts import Masking
from fastjepa.masks.pack import pack
from fastjepa.masks.packings import SEPARATE
from fastjepa.model.jepa import build_pair
from fastjepa.plan.flops import flops_of_packed
from fastjepa.plan.plan import workload_of
from tests.support.networks import masks, perturbed, small
from tests.support.steps import take_step

NOW = StepSettings(lr=3e-3, weight_decay=0.0, ema_momentum=0.99)
IMAGES = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def batch_of(config) -> Batch:
    return Batch(IMAGES, *pack(*masks(), packing=Masking.of(config).packing), bad=())


def queries() -> list[tuple[int, int]]:
    """(image, patch) of every query, in the predictor's order: target block, context, image."""
    context, target = masks()
    return [(i, n) for r in range(3) for _ in range(context.shape[1]) for i in range(3) for n in np.flatnonzero(target[i, r])]


def test_at_the_masked_input_a_block_knows_nothing_of_the_rest_of_its_image():
    """Each query's target is the network's output on the block's own patches, embedded alone."""
    config = small(loss={"target": "input"})
    _, encoder = build_pair(config)
    batch = batch_of(config)
    found = TARGETS["input"](perturbed(encoder), batch)[batch.blocks.target_rows]

    alone = []
    for r in range(3):
        for _ in range(2):
            for i in range(3):
                block = np.zeros((1, 1, 16), bool)
                block[0, 0] = masks()[1][i, r]
                alone.append(encoder(IMAGES[i : i + 1], pack(block, block)[0]))
    torch.testing.assert_close(found, torch.cat(alone))
    whole = TARGETS["output"](encoder, batch_of(small()))[batch_of(small()).blocks.target_rows]
    assert not torch.allclose(found, whole, atol=1e-2)


def test_pixels_are_those_of_the_predicted_patch():
    config = small(loss={"target": "pixels"})
    _, encoder = build_pair(config)
    batch = batch_of(config)
    found = TARGETS["pixels"](encoder, batch)[batch.blocks.target_rows].view(-1, 3, 8, 8)
    mean, std = (torch.tensor(values)[:, None, None] for values in config.mean_std)
    pictures = (IMAGES / 255 - mean) / std
    for patch, (i, n) in zip(found, queries(), strict=True):
        row, col = 8 * (n // 4), 8 * (n % 4)
        torch.testing.assert_close(patch, pictures[i, :, row : row + 8, col : col + 8])


@pytest.mark.parametrize("target", ["output", "input", "pixels"])
@pytest.mark.parametrize("normalize", ["layer", "none", "batch", "running", "dyntanh"])
def test_every_target_is_learned(target: str, normalize: str):
    if (target, normalize) == ("pixels", "dyntanh"):
        return
    """Twenty steps on one batch: the loss falls, and the average follows the encoder."""
    config = small(data={"batch_size": 3}, loss={"target": target, "normalize": normalize})
    jepa, target_encoder = build_pair(config)
    engine, batch = PlainEngine(jepa), batch_of(config)
    average = Average(target_encoder, jepa.encoder)
    before = target_encoder.blocks[0].mlp.fc1.weight.clone()
    losses = [float(take_step(engine, average, [batch], NOW, config).loss) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    assert not torch.equal(target_encoder.blocks[0].mlp.fc1.weight, before)


def test_pixels_need_no_target_network(monkeypatch):
    """And the features that are watched for collapse are then the context's."""
    config = small(data={"batch_size": 3}, loss={"target": "pixels"})
    jepa, target_encoder = build_pair(config)
    assert jepa.predictor.predictor_proj.out_features == 3 * 8 * 8
    monkeypatch.setattr(target_encoder, "forward", lambda *_, **__: pytest.fail("the target network was run"))
    batch = batch_of(config)
    taken = take_step(PlainEngine(jepa), Average(target_encoder, jepa.encoder), [batch], NOW, config)
    assert taken.features.shape == (len(batch.context.idx), 32)
    assert flops_of_packed(workload_of(config), batch.context, batch.target, batch.blocks).target_forward == 0


def test_a_block_of_an_image_counts_once_however_the_targets_are_laid_out():
    """Weights and queries do not depend on where targets come from."""
    together, apart = pack(*masks())[2], pack(*masks(), packing=SEPARATE)[2]
    assert torch.equal(together.weight, apart.weight) and torch.equal(together.queries.idx, apart.queries.idx)
    assert len(torch.unique(apart.target_rows)) == int(masks()[1].sum())


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"loss": {"target": "input"}, "meta": {"predictor": "joint"}}, "meta.predictor: joint has one target for a patch"),
        ({"loss": {"target": "input"}, "runtime": {"cuda_graph": True}}, "runtime.cuda_graph: .*loss.target input"),
        ({"loss": {"normalize": "batch"}, "runtime": {"cuda_graph": True}}, "runtime.cuda_graph: .*loss.normalize batch"),
        (
            {"loss": {"normalize": "running"}, "runtime": {"cuda_graph": True}},
            "cuda_graph: .*normalize batch or running",
        ),
        ({"loss": {"normalize": "dyntanh", "target": "pixels"}}, "loss.normalize: dyntanh is the last norm"),
        ({"loss": {"normalize": "dyntanh", "target_layers": [1]}}, "loss.normalize: dyntanh is the last norm"),
        ({"loss": {"target": "pixels"}, "runtime": {"target_fp8": True}, "meta": {"embed_dim": 768}}, "runtime.target_fp8: "),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        small(**sections)
