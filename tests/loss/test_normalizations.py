"""Normalisations with a memory or a look at the whole step, and the learned one: each against its plain definition."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastjepa.config.load import config_from_dict
from fastjepa.engine.average import Average
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.schedule import StepSettings
from fastjepa.errors import ConfigError
from fastjepa.loader.batch import Batch
from fastjepa.loss.jepa_loss import jepa_loss
from fastjepa.loss.normalizations import RunningNormalization
from fastjepa.loss.objective import choose_objective, over_micro_batches
from fastjepa.loss.regularizers import NoRegularizer
from fastjepa.masks.pack import pack
from fastjepa.model.jepa import build_pair
from fastjepa.model.moments import MOMENTUM, RunningMoments
from fastjepa.plan.plan import workload_of
from fastjepa.plan.sharding import check_step_targets
from fastjepa.ranks.world import join_world, leave_world
from tests.support import ranks
from tests.support.networks import masks, perturbed, plain_jepa, plain_outputs, small
from tests.support.steps import step_of, take_step

NOW = StepSettings(lr=3e-3, weight_decay=0.0, ema_momentum=0.9)
TRUE = torch.tensor(True)


def targets_of(steps: int, layers: int) -> list[list[torch.Tensor]]:
    """Targets of several layers at each step, whose mean and scale move."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(24, 6, generator=generator) * (1 + step + n) + 10 * step - n for n in range(layers)]
        for step in range(steps)
    ]


def plain_moments(history: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted mean over steps of each step's mean and variance, the last step weighing most; 0 and 1 before the first."""
    if not history:
        return torch.zeros(6), torch.ones(6)
    weights = torch.tensor([MOMENTUM**age for age in range(len(history) - 1, -1, -1)], dtype=torch.float64)
    weights = (weights / weights.sum()).float()
    return tuple(sum(w * f(rows) for w, rows in zip(weights, history, strict=True))
                 for f in (lambda rows: rows.mean(0), lambda rows: rows.var(0, correction=0)))  # fmt: skip


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("averaged", [False, True])
def test_running_moments_are_those_of_the_steps_before(pieces, averaged):
    layers, blocks = 2, pack(np.ones((24, 1, 1), bool), np.ones((24, 1, 1), bool))[2]
    normalization = RunningNormalization(RunningMoments(layers + averaged, 6))
    seen = [[] for _ in range(layers + 1)]
    for targets in targets_of(4, layers):
        moments = [plain_moments(history) for history in seen]
        expected = [(rows - mean) / (variance + 1e-5).sqrt() for rows, (mean, variance) in zip(targets, moments, strict=False)]
        mean = sum(expected) / layers
        wanted = [(mean - moments[-1][0]) / (moments[-1][1] + 1e-5).sqrt()] if averaged else expected
        for history, rows in zip(seen, [*targets, mean], strict=True):
            history.append(rows)
        chunks = zip(*(rows.chunk(pieces) for rows in targets), strict=True)
        found = [normalization.wanted(part, averaged) for part in chunks]
        for whole, parts in zip(wanted, zip(*found, strict=True), strict=True):
            torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)
        normalization.update(TRUE)
    prediction = torch.randn(24, 6 if averaged else 12, requires_grad=True)
    loss = normalization.loss(prediction, tuple(targets), blocks, "l2")
    wanted = torch.cat(normalization.wanted(tuple(targets), averaged), dim=1)
    torch.testing.assert_close(loss, F.mse_loss(prediction, wanted))
    (ours,) = torch.autograd.grad(loss, prediction)
    torch.testing.assert_close(ours, 2 * (prediction.detach() - wanted) / wanted.numel())


def test_a_step_that_was_not_taken_or_not_finite_leaves_the_moments():
    moments = RunningMoments(1, 6)
    first, second = targets_of(2, 1)
    moments.standardised(first[0], 0)
    moments.update(TRUE)
    before = copy.deepcopy(moments.state_dict())
    for rows, finite in ((second[0], ~TRUE), (torch.full((4, 6), torch.nan), TRUE), (torch.full((4, 6), 1e30), TRUE)):
        moments.standardised(rows, 0)
        moments.update(finite)
        assert all(torch.equal(value, before[name]) for name, value in moments.state_dict().items())
    moments.standardised(second[0], 0)
    moments.update(TRUE)
    torch.testing.assert_close(moments.mean[0], plain_moments([first[0], second[0]])[0])


def share_moments() -> None:
    place = join_world("cpu", timeout=240)
    alone, together = RunningMoments(1, 6), RunningMoments(1, 6)
    for (rows,) in targets_of(3, 1):
        mine = slice(0, 10) if place.rank == 0 else slice(10, 24)  # ranks have different numbers of targets
        together.standardised(rows[mine], 0)
        together.update(TRUE)
        alone.standardised(torch.cat((rows, rows)), 0)
        alone.update(TRUE)
    for name, value in together.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-4, atol=1e-4)
    leave_world()


def test_ranks_share_their_moments():
    ranks.run(share_moments)


@pytest.mark.parametrize("layers", ["last", "each", "mean"])
def test_targets_over_the_batch_are_the_same_in_micro_batches(layers):
    """Losses, gradients and the features that are watched of three micro-batches of an image against one of three."""
    keys = {} if layers == "last" else {"target_layers": [1, 2], "layers": layers}
    config = small(data={"batch_size": 3}, loss={"normalize": "batch"} | keys)
    images, (context, target) = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)), masks()
    whole = [Batch(images, *pack(context, target), bad=())]
    parts = [Batch(images[i : i + 1], *pack(context[i : i + 1], target[i : i + 1], 3), bad=()) for i in range(3)]
    results = []
    for batches in (whole, parts):
        jepa, target_encoder = (perturbed(network, seed) for seed, network in enumerate(build_pair(config)))
        engine = PlainEngine(jepa, micro_batches=len(batches))
        step = step_of(engine, Average(target_encoder, jepa.encoder), config)
        if len(batches) > 1:
            plain, last = step.objective.targets, {}

            def compute(batch, plain=plain, encoder=target_encoder, last=last):
                with torch.no_grad():
                    last["rows"] = plain(encoder, batch)
                return last["rows"]

            step.objective = over_micro_batches(step.objective, layers == "mean", compute)
        tally = step.learn(batches, NOW)
        results.append((tally.loss, [p.grad.clone() for p in engine.parameters]))
    assert torch.equal(tally.features, last["rows"] if layers == "last" else last["rows"][-1])
    (loss, gradients), (other, theirs) = results
    torch.testing.assert_close(loss, other)
    for ours, plain in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_targets_of_a_whole_step_that_do_not_fit_are_refused():
    def config(**runtime):
        return config_from_dict({"data": {"batch_size": 16, "crop_size": 64}, "mask": {"patch_size": 8, "min_keep": 4},
                                 "loss": {"normalize": "batch"}, "runtime": {"dtype": "fp32", **runtime}})  # fmt: skip

    for case, memory in ((config(micro_batch=2), 10**12), (config(), 1)):
        check_step_targets(workload_of(case), 1, 0, memory)
    with pytest.raises(ConfigError, match="loss.normalize: batch keeps the targets of a whole step, about .* take running"):
        check_step_targets(workload_of(config(micro_batch=2)), 1, 0, 10**8)


def test_dyntanh_is_the_last_norm_of_both_encoders_and_its_scale_is_learned_by_one():
    """Against a loop over images and blocks, gradients included; the target network's scale is the average."""
    config = small(data={"batch_size": 3}, loss={"normalize": "dyntanh"})
    jepa, target_encoder = (perturbed(network, seed) for seed, network in enumerate(build_pair(config)))
    plain, (context, target) = copy.deepcopy(jepa), masks()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    batch = Batch(images, *pack(context, target), bad=())
    objective = choose_objective(config.loss, NoRegularizer())
    with torch.no_grad():
        rows = objective.targets(target_encoder, batch)
        norm = target_encoder.norm
        wanted = [norm.weight * torch.tanh(norm.alpha * plain_outputs(target_encoder, image[None])[-2][0]) + norm.bias
                  for image in images]  # fmt: skip
    loss = jepa_loss(jepa(images, batch.context, batch.blocks)[0], rows, batch.blocks, normalization=objective.normalization)
    loss.backward()
    said, at, expected = plain_jepa(plain, images, context, target)[0], 0, 0.0
    for r, _, i in itertools.product(range(3), range(2), range(3)):
        hidden = np.flatnonzero(target[i, r])
        expected = expected + F.smooth_l1_loss(said[at : at + len(hidden)], wanted[i][hidden]) / 18
        at += len(hidden)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(jepa.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert jepa.encoder.norm.alpha.grad.abs().sum() > 0

    engine, average = PlainEngine(jepa), Average(target_encoder, jepa.encoder)
    jepa.zero_grad()
    before, online = target_encoder.norm.alpha.clone(), jepa.encoder.norm.alpha
    take_step(engine, average, [batch], NOW, config)
    torch.testing.assert_close(target_encoder.norm.alpha, 0.9 * before + 0.1 * online)
