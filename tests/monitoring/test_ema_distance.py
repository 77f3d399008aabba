"""The distance of the average: its definition on saved weights, and the same elements of them however ranks share them."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor, nn

from fastjepa.config.load import load_config
from fastjepa.engine.average import PairedPiece
from fastjepa.engine.schedule import StepSettings
from fastjepa.monitoring import ema_distance
from fastjepa.monitoring.alarms import FAR_AFTER, AlarmSettings, collapse_alarms
from fastjepa.monitoring.ema_distance import EmaDistance, sample_stride
from tests.support.places import ROOT
from tests.support.runs import distances, trained, weights


def defined(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """The distance from the weights of two checkpoints, a step apart."""
    names = [name.removeprefix("encoder.") for name in after if name.startswith("encoder.")]
    now, past, average = (torch.cat([w[f"{network}.{name}"].flatten() for name in names if name != "pos_embed"])
                          for w, network in ((after, "encoder"), (before, "encoder"), (after, "target_encoder")))  # fmt: skip
    return float((now - average).norm() / (now - past).norm())


def test_it_is_the_definition_on_the_weights_of_a_run(toy_config, tmp_path):
    entries = trained(toy_config, tmp_path, "logging.monitor_every=3", "logging.probe_every=0", "logging.checkpoint_every=1",
                      "logging.keep_last=99", "data.num_workers=0", "optimization.ema=[[0.5,0.9],[0.6,0.5]]")  # fmt: skip
    read = {entry["step"]: entry["ema_distance"] for entry in entries if "ema_distance" in entry}
    assert list(read) == [1, 3, 6, 9]
    assert read[1] == pytest.approx(0.9, rel=1e-5), "both networks began alike: the momentum is all there is"
    for step in (3, 6, 9):
        assert read[step] == pytest.approx(defined(weights(tmp_path, step - 1), weights(tmp_path, step)), rel=1e-4)


def test_no_momentum_is_no_distance(toy_config, tmp_path):
    few = ("--max-steps", 2, "data.num_workers=0", "logging.monitor_every=1", "logging.probe_every=0")
    assert distances(trained(toy_config, tmp_path / "none", *few, "optimization.ema=[0.0,0.0]")) == [0.0, 0.0]
    still = ("optimization.lr=0.0", "optimization.start_lr=0.0", "optimization.final_lr=0.0")
    assert distances(trained(toy_config, tmp_path / "still", *few, *still)) == [], "there is no update"


def cut(whole: dict[str, Tensor], places: list[int]) -> list[dict[str, tuple[int, Tensor]]]:
    """Parts of all weights side by side, cut at those places: {name: (start in the weight, elements)} each."""
    ends = [0, *sorted(places), sum(p.numel() for p in whole.values())]
    parts = []
    for low, high in zip(ends, ends[1:], strict=False):
        begun, part = 0, {}
        for name, p in whole.items():
            start, stop = max(low - begun, 0), min(high - begun, p.numel())
            if start < stop:
                part[name] = start, p.view(-1)[start:stop]
            begun += p.numel()
        parts.append(part)
    return parts


@given(shapes=some.lists(some.tuples(some.integers(1, 9), some.integers(1, 9)), min_size=1, max_size=4), data=some.data(),
       wanted=some.integers(1, 200))  # fmt: skip
def test_ranks_look_at_the_same_elements_however_the_weights_are_cut(shapes, data, wanted):
    weights = {str(number): torch.randn(shape) for number, shape in enumerate(shapes)}
    averages, moved = ({name: torch.randn_like(p) for name, p in weights.items()} for _ in range(2))
    target = nn.ParameterList([nn.Parameter(p) for p in averages.values()])
    places = data.draw(some.lists(some.integers(0, sum(p.numel() for p in weights.values())), max_size=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema_distance, "SAMPLED_ELEMENTS", wanted)
        every = sample_stride([p.shape for p in target])
        found = torch.zeros(2)
        for mine, theirs in zip(cut(weights, places), cut(averages, places), strict=True):
            pairs = [PairedPiece(p.clone(), theirs[name][1], start) for name, (start, p) in mine.items()]
            distance = EmaDistance(SimpleNamespace(target_encoder=target, pairs=lambda pairs=pairs: pairs), lambda step: True)
            distance.keep(0)
            for (name, (start, p)), pair in zip(mine.items(), pairs, strict=True):
                pair.online.add_(moved[name].view(-1)[start : start + p.numel()])
            found += distance.after(1)
    was, step, average = (torch.cat([of[name].flatten()[::every] for name in weights]) for of in (weights, moved, averages))
    expected = torch.stack([(was + step - average).square().sum(), step.square().sum()])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_sample_of_a_large_network_is_small_and_of_all_columns():
    assert sample_stride([torch.Size([768, 768])] * 100 + [torch.Size([768])]) == 59  # 57 has the divisor 3, 58 has 2
    assert sample_stride([torch.Size([10, 10])]) == 1


def warnings_of(entries: list[dict], regularized: bool, warmup_steps: float, averaged: bool = True) -> list[str]:
    """Return the warnings of a run with these lines of metrics.jsonl, in order."""
    settings, found = AlarmSettings(1e-3, regularized, warmup_steps, averaged), []
    for number, entry in enumerate(entries, 1):
        now = StepSettings(entry["lr"], entry["weight_decay"], entry["ema_momentum"])
        found += collapse_alarms(entries[:number], now, settings)
    return found


def step_of(warning: str) -> int:
    return int(warning.removeprefix("step ").partition(":")[0])


def test_of_two_real_runs_the_one_that_collapses_is_told_before_its_k_nn_shows_it():
    warmup = load_config("multiblock").optimization.warmup * 468  # steps an epoch
    said = {name: warnings_of([json.loads(line) for line in (ROOT / f"docs/metrics/{name}.jsonl").read_text().splitlines()],
                              name == "healthy", warmup) for name in ("healthy", "collapsing")}  # fmt: skip
    assert said["healthy"] == []
    (near,) = (warning for warning in said["collapsing"] if "ema_distance" in warning)
    (stagnant,) = (warning for warning in said["collapsing"] if "k-NN" in warning)
    assert step_of(near) == min(map(step_of, said["collapsing"])) < step_of(stagnant)
    assert "stays 0 updates from the context encoder (ema_distance) and the features do not recover" in near
    assert near.endswith("raise optimization.ema (now 0) to 0.99 or more")


SHRINKING = (10.0, 9.0, 8.0, 7.0)


@pytest.mark.parametrize(
    "distances, ranks, warned",
    [
        ((0.9, 7.7, 7.7, 4.8), (14.1, 6.4, 5.5, 4.2), True),  # multiblock without a regularizer, momentum 0.9: it collapses
        ((0.99, 32.7, 60.3, 35.6), (14.1, 13.7, 11.8, 9.9), False),  # 0.99: after 500 steps its rank is back
        ((0.5, 0.5, 0.5, 0.5), SHRINKING, True),
        ((0.5, 0.5, 0.5, 0.5), (10.0, 12.0, 14.0, 16.0), False),  # the features do without
        ((0.5, 19.0, 18.0, 21.0), SHRINKING, False),  # they shrink for another reason
        ((0.5, 0.5, 19.0, 0.5), SHRINKING, False),  # one odd step
        ((0.5, float("nan"), None, 0.5), SHRINKING, False),
    ],
)
def test_an_average_that_stays_near_warns_where_features_shrink(distances, ranks, warned):
    rows = zip((1, FAR_AFTER, FAR_AFTER + 5, FAR_AFTER + 10), distances, ranks, strict=True)
    entries = [{"step": step, "loss": 0.3, "lr": 1e-3, "weight_decay": 0.0, "ema_momentum": 0.9, "ema_distance": distance,
                "effective_rank": rank} for step, distance, rank in rows]  # fmt: skip
    assert not any("optimization.ema" in warning for warning in warnings_of(entries, False, 0, averaged=False))
    said = [warning for warning in warnings_of(entries, False, 0) if "ema_distance" in warning]
    assert [step_of(warning) for warning in said] == ([FAR_AFTER + 5] if warned else [])
    assert all(warning.endswith("raise optimization.ema (now 0.9) to 0.99 or more") for warning in said)
