"""The compiled networks: a graph each, few recompilations however ragged the masks, and the eager step's results."""

import copy

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from fastjepa.engine.average import Average
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.schedule import StepSettings
from fastjepa.loader.batch import Batch
from fastjepa.masks.pack import pack
from fastjepa.model.jepa import build_pair
from tests.support.networks import perturbed, small
from tests.support.steps import step_of, take_step

NOW = StepSettings(lr=1e-3, weight_decay=0.1, ema_momentum=0.9)


def batches(steps: int, equal_every: int = 5):
    """Random masks, now and then with contexts of one length, which take another way through attention."""
    random = np.random.default_rng(0)
    for step in range(steps):
        context, target = random.random((3, 1, 16)) < 0.5, random.random((3, 3, 16)) < 0.4
        context[:, :, 0] = target[:, :, 1] = True
        if step % equal_every == equal_every - 1:
            context[:] = np.arange(16) < 5
        yield Batch(torch.from_numpy(random.random((3, 3, 32, 32), np.float32)), *pack(context, target), bad=())


def contender(compiled: bool) -> tuple[PlainEngine, Average, object]:
    config = small(meta={"depth": 1, "pred_depth": 2}, runtime={"compile": compiled})
    jepa, target_encoder = build_pair(config)
    perturbed(jepa)
    target_encoder.load_state_dict(jepa.encoder.state_dict())
    for network in (jepa, target_encoder) if compiled else ():
        network.compile(dynamic=True)  # as build_networks does
    return PlainEngine(jepa), Average(target_encoder, jepa.encoder), config


@pytest.fixture
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.slow
def test_fifty_ragged_steps_compile_a_few_graphs_and_none_breaks(fresh, monkeypatch):
    """Every way through attention (equal or ragged, of contexts, targets and predictor) is a graph of its own."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile(f, **how, backend="aot_eager", fullgraph=True))
    engine, average, config = contender(True)
    plain, plain_average, eager = contender(False)
    for batch in batches(50):
        taken = take_step(engine, average, [batch], NOW, config)
        expected = take_step(plain, plain_average, [batch], NOW, eager)
        torch.testing.assert_close(taken.loss, expected.loss, rtol=1e-4, atol=1e-6)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 8  # of the pair and of the target encoder, four at most each
    for ours, theirs in zip(engine.parameters, plain.parameters, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-3


@pytest.mark.slow
def test_inductor_gives_the_eager_loss_and_gradients(fresh):
    batch = next(batches(1))
    results = []
    for compiled in (False, True):
        engine, average, config = contender(compiled)
        tally = step_of(engine, average, config).learn([batch], NOW)
        results.append((tally.loss, tally.features, copy.copy([p.grad for p in engine.parameters])))
    (loss, target, gradients), (fused_loss, fused_target, fused) = results
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused_target, target, rtol=1e-4, atol=1e-5)
    for mine, plain in zip(fused, gradients, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-5 + 1e-4 * float(plain.abs().max()))
