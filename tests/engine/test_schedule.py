"""Schedules against the paper's description; the reference trajectories check them to the last digit."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import OptimizationConfig
from fastjepa.engine.schedule import Schedule, cosine_between, warmup_notes

PLAN = Schedule(OptimizationConfig(epochs=10, warmup=2, ema=(0.9, 1.0)), steps_per_epoch=5)


def test_learning_rate_rises_linearly_then_falls_along_a_cosine():
    rates = [PLAN(step).lr for step in range(PLAN.total_steps)]
    rise = [b - a for a, b in zip(rates[:9], rates[1:9], strict=False)]
    assert rise == pytest.approx([rise[0]] * len(rise))
    assert rates[0] == pytest.approx(2e-4 + (1e-3 - 2e-4) / 10), "the first step already uses the schedule at 1"
    assert max(rates) == rates[9] == pytest.approx(1e-3)
    assert rates[29] == pytest.approx((1e-3 + 1e-6) / 2, rel=1e-6), "half-way down"
    assert rates[-1] == pytest.approx(1e-6)


def test_weight_decay_and_momentum_end_where_the_config_says():
    assert PLAN(PLAN.total_steps - 1).weight_decay == pytest.approx(0.4)
    assert PLAN(0).ema_momentum == 0.9
    assert PLAN(25).ema_momentum == pytest.approx(0.95)


def test_muons_rate_follows_adamws_in_proportion():
    plan = Schedule(OptimizationConfig(epochs=10, warmup=2, muon_lr=0.02, muon_weight_decay=(0.1, 0.3)), steps_per_epoch=5)
    settings = [plan(step) for step in range(plan.total_steps)]
    assert [now.muon_lr / now.lr for now in settings] == pytest.approx([20.0] * 50)
    assert max(now.muon_lr for now in settings) == pytest.approx(0.02)
    assert settings[0].muon_weight_decay < settings[24].muon_weight_decay < settings[-1].muon_weight_decay == pytest.approx(0.3)


def test_ipe_scale_stretches_every_schedule_beyond_the_run():
    stretched = Schedule(OptimizationConfig(epochs=10, warmup=2, ema=(0.9, 1.0), ipe_scale=1.25), steps_per_epoch=5)
    assert stretched.total_steps == PLAN.total_steps
    last = stretched(stretched.total_steps - 1)
    assert last.lr > 1e-4
    assert last.weight_decay < 0.4
    assert last.ema_momentum == pytest.approx(0.9 + 0.1 * 49 / 62.5)


@pytest.mark.parametrize("scale", [1e-9, 0.01, 0.25, 0.5, 0.8002560819462228, 0.999, 1.0])
@pytest.mark.parametrize("ema", [(0.9, 1.0), (0.996, 0.999), (1.0, 0.5), (0.0, 1.0), (0.3, 0.0), (0.998, 0.998)])
def test_schedules_that_end_before_the_run_stay_at_their_last_values(scale, ema):
    """A momentum beyond 1 lets the target encoder move away from the encoder, faster each step."""
    short = Schedule(OptimizationConfig(epochs=10, warmup=2, ema=ema, ipe_scale=scale), steps_per_epoch=5)
    settings = [short(step) for step in range(short.total_steps)]
    assert all(min(ema) <= now.ema_momentum <= max(ema) for now in settings)
    for now in settings[math.ceil(scale * 50) :]:
        assert now.ema_momentum == ema[1] and now.weight_decay == pytest.approx(0.4)
        assert now.step < 10 or now.lr == pytest.approx(1e-6), "the warm-up of 10 steps is not cut"


momenta = some.floats(0, 1)


@given(first=momenta, last=momenta, steps=some.integers(1, 300), scale=some.floats(0.01, 3))
def test_two_momenta_are_the_official_line_to_the_bit_and_knots_at_both_ends_are_the_same(first, last, steps, scale):
    line, knots = (Schedule(OptimizationConfig(epochs=1, ema=ema, ipe_scale=scale), steps)
                   for ema in ((first, last), ((0.0, first), (1.0, last))))  # fmt: skip
    for step in range(steps):
        expected = first + step * (last - first) / (scale * steps) if step < scale * steps else last
        assert line(step).ema_momentum == knots(step).ema_momentum == expected


@given(shares=some.lists(some.integers(0, 1000), min_size=1, max_size=5, unique=True).map(sorted), data=some.data(),
       steps=some.integers(1, 300), scale=some.sampled_from([0.3, 1.0, 1.25]))  # fmt: skip
def test_the_momentum_goes_straight_from_knot_to_knot_and_stands_still_outside(shares, data, steps, scale):
    values = data.draw(some.lists(momenta, min_size=len(shares), max_size=len(shares)))
    knots = [[share / 1000, value] for share, value in zip(shares, values, strict=True)]
    optimization = config_from_dict({"optimization": {"epochs": 1, "ema": knots, "ipe_scale": scale}}).optimization
    found = [Schedule(optimization, steps)(step).ema_momentum for step in range(steps)]
    xs = [share / 1000 * scale * steps for share in shares]
    assert found == pytest.approx(np.interp(range(steps), xs, values).tolist(), abs=1e-9)
    assert all(min(values) <= momentum <= max(values) for momentum in found)


def test_no_warm_up_starts_at_the_full_rate():
    assert Schedule(OptimizationConfig(epochs=1, warmup=0), 100)(0).lr == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"epochs": 3},
            "40 epochs of warm-up in a run of 3: the learning rate ends at 0.00026 (optimization.lr 0.001) and never",
        ),
        (
            {"epochs": 40},
            "40 epochs of warm-up in a run of 40: the learning rate ends at 0.001 (optimization.lr 0.001) and never",
        ),
        (
            {"epochs": 2, "warmup": 2.5, "ipe_scale": 5.0},
            "2.5 epochs of warm-up in a run of 2: the learning rate ends at 0.00084",
        ),
        (
            {"epochs": 100, "ipe_scale": 0.3},
            "ipe_scale 0.3 ends the schedules after 30 of 100 epochs: the learning rate falls from",
        ),
        ({"epochs": 41}, None),
        ({"epochs": 1, "warmup": 0}, None),
        ({"epochs": 100, "ipe_scale": 0.5}, None),
    ],
)
def test_a_warm_up_without_a_decay_after_it_is_said_with_its_numbers(keys, says):
    optimization = OptimizationConfig(**keys)
    said = warmup_notes(optimization)
    assert says in said[0] if says else said == []
    if says and "never" in says:
        plan = Schedule(optimization, steps_per_epoch=7)
        assert f"ends at {plan(plan.total_steps - 1).lr:.3g} " in said[0]


def test_a_cosine_stays_at_its_end():
    assert cosine_between(1.0, 0.0, 1.5) == 0.0
