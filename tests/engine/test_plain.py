"""The optimizer's groups, the EMA and the engine's step: what a non-finite gradient may touch, which is nothing."""

import copy

import pytest
import torch

from fastjepa.engine.adamw import apply_schedule, build_adamw
from fastjepa.engine.average import Average
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.schedule import Schedule, StepSettings
from fastjepa.loader.batch import Batch
from fastjepa.loss.regularizers import BatchRegularizer
from fastjepa.masks.pack import pack
from fastjepa.model.jepa import build_pair
from fastjepa.ranks.world import World
from fastjepa.run.build import build_networks
from tests.support.networks import masks, small
from tests.support.steps import take_step

NOW = StepSettings(lr=1e-2, weight_decay=0.1, ema_momentum=0.9)


def stepped(engine: PlainEngine, poison: float | None = None) -> torch.Tensor:
    context, _, blocks = pack(*masks())
    prediction, *_ = engine(torch.ones(3, 3, 32, 32), context, blocks)
    engine.backward(prediction.square().mean())
    if poison is not None:
        engine.parameters[7].grad.view(-1)[3] = poison
    return engine.step(NOW)


def snapshot(engine: PlainEngine) -> list[torch.Tensor]:
    moments = [value for state in engine.optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*engine.parameters, *moments)]


def test_groups_are_the_official_ones():
    jepa, _ = build_pair(small())
    optimizer = build_adamw(jepa.encoder, jepa.predictor)
    apply_schedule(optimizer, NOW)
    groups = optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0, 0.0]
    assert all(group["lr"] == 1e-2 for group in groups)
    assert [len(group["params"]) for group in groups] == [9, 11, 19, 20]
    assert any(jepa.predictor.mask_token is p for p in groups[1]["params"]), "the mask token is decayed"
    assert all(p.ndim <= 1 for group in groups[2:] for p in group["params"])


def test_the_predictor_may_learn_at_a_rate_of_its_own():
    """AdamW's first step without decay is lr in every direction: the two networks move by lr and by 4 lr."""
    jepa, _ = perturbed_pair()
    before = {name: p.detach().clone() for name, p in jepa.named_parameters()}
    engine, now = PlainEngine(jepa, pred_lr_scale=4.0), StepSettings(lr=1e-3, weight_decay=0.0, ema_momentum=0.9)
    for p in engine.parameters:
        p.grad = torch.ones_like(p)
    assert engine.step(now)
    for name, p in jepa.named_parameters():
        moved = 4e-3 if name.startswith("predictor.") else 1e-3
        torch.testing.assert_close(before[name] - p.detach(), torch.full_like(p, moved), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_gradient_leaves_weights_moments_and_counts(poison):
    engine = PlainEngine(perturbed_pair()[0])
    assert stepped(engine).item()
    before = snapshot(engine)
    assert not stepped(engine, poison).item()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(engine), strict=True))
    assert stepped(engine).item()
    assert not torch.equal(before[0], snapshot(engine)[0])


def test_the_step_after_a_skipped_one_is_the_one_that_would_have_been():
    clean, skipping = (PlainEngine(perturbed_pair()[0]) for _ in range(2))
    stepped(clean)
    stepped(skipping, float("nan"))
    stepped(skipping)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(clean), snapshot(skipping), strict=True))


def perturbed_pair():
    torch.manual_seed(0)
    return build_pair(small())


def test_ema_moves_the_target_only_when_the_step_was_taken():
    jepa, target = perturbed_pair()
    with torch.no_grad():
        for parameter in jepa.encoder.parameters():
            parameter.add_(1.0)
    before, average = copy.deepcopy(target.state_dict()), Average(target, jepa.encoder)
    average.update(0.75, torch.tensor(False))
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())
    average.update(0.75, torch.tensor(True))
    for name, value in target.named_parameters():
        torch.testing.assert_close(value, before[name] + 0.25)


def test_ema_keeps_small_steps_that_bf16_would_lose():
    target, online = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    with torch.no_grad():
        target.weight.fill_(1.0)
        online.weight.fill_(1.01)
    average = Average(target, online)
    for _ in range(1000):
        average.update(0.9999, torch.tensor(True))
    assert target.weight.item() == pytest.approx(1.01 - 0.01 * 0.9999**1000, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_add_up_to_the_batch(dtype):
    context_mask, target_mask = masks(b=4)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for size in (4, 2, 1):
        engine = PlainEngine(perturbed_pair()[0], micro_batches=4 // size)
        for start in range(0, 4, size):
            part = slice(start, start + size)
            context, _, blocks = pack(context_mask[part], target_mask[part], images=4)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                prediction, *_ = engine(images[part], context, blocks)
            engine.backward((prediction.float().square().mean(dim=1) * blocks.weight).sum())
        gradients.append([p.grad for p in engine.parameters])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for other in gradients[1:]:
        for whole, pieces in zip(gradients[0], other, strict=True):
            assert (whole - pieces).abs().max() <= tolerance * whole.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_device(dtype):
    config = small(runtime={"dtype": dtype, "device": "cuda"})
    device = torch.device("cuda")
    jepa, target_encoder = build_networks(config, device)
    engine, average = PlainEngine(jepa), Average(target_encoder, jepa.encoder)
    batches = [Batch(torch.randn(3, 3, 32, 32), *pack(*masks()), bad=()).to(device)]
    take_step(engine, average, batches, NOW, config)  # compiles kernels and makes tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        taken = take_step(engine, average, batches, NOW, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert taken.loss.item() > 0


def test_a_step_tells_the_regularizer_its_number():
    """So that random projections are the schedule's, not those of how often a process was called."""
    config = small(data={"batch_size": 3}, loss={"regularizer": "vicreg"})
    seen = []
    spread = BatchRegularizer(lambda pooled, step: seen.append(step) or pooled.sum(), 1, World(0, 0, 1, torch.device("cpu")))
    jepa, target_encoder = build_pair(config)
    batch = Batch(torch.ones(3, 3, 32, 32), *pack(*masks()), bad=())
    for now in (Schedule(config.optimization, 4)(step) for step in (5, 2)):
        take_step(PlainEngine(jepa), Average(target_encoder, jepa.encoder), [batch], now, config, spread)
    assert seen == [5, 2]
