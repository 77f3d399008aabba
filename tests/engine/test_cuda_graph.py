"""The CUDA graph of a micro-batch: on a GPU against the eager step, and everywhere which batches it leaves alone."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastjepa.engine.average import Average
from fastjepa.engine.cuda_graph import CudaGraph, padded_size
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.schedule import StepSettings
from fastjepa.engine.tally import StepTally
from fastjepa.loader.batch import Batch
from fastjepa.masks.draw import draw_masks
from fastjepa.masks.layouts import Masking
from fastjepa.masks.pack import pack
from fastjepa.masks.packed import PackedSize
from fastjepa.masks.padding import drawn_sizes
from fastjepa.model.jepa import build_pair
from fastjepa.plan.plan import workload_of
from fastjepa.run.build import build_networks, build_runs
from tests.support.networks import perturbed
from tests.support.padding import configured
from tests.support.steps import step_of, take_step

STEPS, NOW = 20, StepSettings(1e-3, 0.1, 0.9)


def tight():
    """A config whose budget is the median of each count, so that many batches are over it."""
    config = configured()
    rows = np.median(drawn_sizes(Masking.of(config), 8, 8), axis=0)[:3].astype(int).tolist()
    return configured(token_budget=rows)


def drawn(config, step: int, pieces: int = 1, device: str = "cpu") -> list[Batch]:
    """The padded micro-batches of a step."""
    room = workload_of(config).padding_budget(8, 8 // pieces)
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(step))
    pair = draw_masks(Masking.of(config), step, range(8), 8)
    parts = [slice(start, start + 8 // pieces) for start in range(0, 8, 8 // pieces)]
    packed = [Batch(images[s], *pack(*(mask[s] for mask in pair), images=8, budget=room), bad=()) for s in parts]
    return [batch.to(torch.device(device)) for batch in packed]


def test_a_batch_over_the_budget_runs_without_and_is_counted():
    config = tight()
    jepa, target_encoder = build_pair(config)
    engine, average = PlainEngine(jepa, static_gradients=True), Average(target_encoder, jepa.encoder)
    runs = build_runs(config, engine)
    eager, graph = step_of(engine, average, config), step_of(engine, average, config, None, runs)
    room = workload_of(config).padding_budget(8)
    sizes = [PackedSize(*size) for size in drawn_sizes(Masking.of(config), 8, 8)[:STEPS].tolist()]
    over = [step for step, size in enumerate(sizes) if not room.holds(size)]
    assert 0 < len(over) < STEPS
    assert [padded_size(drawn(config, step)[0]) == room.size for step in range(STEPS)] == [s not in over for s in range(STEPS)]
    for step in over[:2]:
        loss = graph.learn(drawn(config, step), NOW).loss
        engine.optimizer.zero_grad()
        assert torch.equal(loss, eager.learn(drawn(config, step), NOW).loss)
    assert runs.logged() == {"replayed": 0, "uncaptured": 2}
    assert eager.runs.logged() == {}


def test_a_replay_leaves_what_it_computed_where_the_body_does():
    """The results of the capture are the step's, also after a batch that ran without; losses of micro-batches add up."""
    config = configured()
    batch, tally, runs = drawn(config, 0)[0], StepTally(), CudaGraph(workload_of(config).padding_budget(8), [], 3)
    static = torch.tensor(0.0)
    replays = iter((5.0, 7.0))
    runs.graph = SimpleNamespace(replay=lambda: static.fill_(next(replays)))  # as it is once it has been captured
    runs.batch, runs.results = batch.clone(), (static, torch.ones(2, 3))
    over = replace(batch, context=replace(batch.context, max_len=99))
    for given in runs.over([batch, over, batch], tally):
        assert given is over
        tally.note(torch.tensor(1.0), torch.zeros(1, 3))
    assert float(tally.loss) == 5.0 + 1.0 + 7.0 and tally.features.shape == (2, 3)
    assert runs.logged() == {"replayed": 2, "uncaptured": 1}


def test_gradients_stay_where_they_are():
    """Zeroed in place after a step, and the step is the one that gradients made anew would take."""
    config = configured()
    results, places = [], []
    for static in (False, True):
        jepa, target_encoder = build_pair(config)
        engine, average = PlainEngine(jepa, static_gradients=static), Average(target_encoder, jepa.encoder)
        plain = replace(config, runtime=replace(config.runtime, cuda_graph=False))
        for step in range(3):
            take_step(engine, average, drawn(config, step), StepSettings(1e-3, 0.1, 0.9), plain)
            places.append([p.grad.data_ptr() for p in engine.parameters] if static else [p.grad for p in engine.parameters])
        results.append(engine.parameters)
    assert places[:3] == [[None] * len(results[0])] * 3 and places[3] == places[4] == places[5]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_captured_steps_are_the_eager_ones(pieces, dtype):
    """Twenty steps with schedules that move, a non-finite one among them, batches over the budget included."""
    config = tight()
    config = replace(config, runtime=replace(config.runtime, device="cuda", dtype=dtype, micro_batch=8 // pieces))
    if pieces > 1:
        config = replace(config, runtime=replace(config.runtime, token_budget=None))
    device, runs = torch.device("cuda"), []
    for captured in (False, True):
        ours = replace(config, runtime=replace(config.runtime, cuda_graph=captured))
        jepa, target_encoder = build_networks(ours, device)
        perturbed(jepa.cpu()).to(device)
        target_encoder.load_state_dict(copy.deepcopy(jepa.encoder.state_dict()))
        engine = PlainEngine(jepa, micro_batches=pieces, static_gradients=captured)
        average = Average(target_encoder, jepa.encoder)
        one_step, losses = step_of(engine, average, ours, None, build_runs(ours, engine)), []
        for step in range(STEPS):
            batches = drawn(config, step, pieces, "cuda")
            if step == 7:
                batches[0].images.fill_(float("nan"))
            losses.append(one_step(batches, StepSettings(1e-4 * step, 0.1, 0.9 + step / 400))[0].loss)
        runs.append((torch.stack(losses), engine.parameters, list(target_encoder.parameters()), one_step.runs))
    (eager, parameters, averages, _), (replayed, ours, our_averages, graph) = runs
    tolerance = 1e-4 if dtype == "fp32" else 2e-2
    torch.testing.assert_close(replayed, eager, rtol=tolerance, atol=tolerance, equal_nan=True)
    for mine, plain in zip([*ours, *our_averages], [*parameters, *averages], strict=True):
        assert (mine - plain).norm() <= 10 * tolerance * plain.norm() + tolerance
    assert graph.replayed + graph.uncaptured == STEPS * pieces and graph.replayed > 0
    assert graph.uncaptured > 0 or pieces > 1


@pytest.mark.gpu
def test_a_replay_never_waits_for_the_device():
    config = configured(device="cuda")
    jepa, target_encoder = build_networks(config, torch.device("cuda"))
    engine, average = PlainEngine(jepa, static_gradients=True), Average(target_encoder, jepa.encoder)
    runs = build_runs(config, engine)
    batches = [drawn(config, step, device="cuda") for step in range(2)]
    take_step(engine, average, batches[0], NOW, config, None, runs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_step(engine, average, batches[1], NOW, config, None, runs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert runs.replayed == 2
