"""Readings with known answers, warnings that name the cause and the key, and real runs that collapse, resume and share."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from fastjepa.cli.main import main
from fastjepa.config.load import config_from_dict, load_config
from fastjepa.data.sources import open_source
from fastjepa.engine.schedule import StepSettings
from fastjepa.evals.collapse import effective_rank, feature_std, lidar
from fastjepa.model.jepa import build_pair
from fastjepa.monitoring.alarms import AlarmSettings, collapse_alarms
from fastjepa.monitoring.monitor import FEWEST_PROBES, LEAST_SHARE, READING_NAMES, gather_probe, plan_probes, probe_falls
from fastjepa.plan.flops import count_flops, flops_per_image
from fastjepa.plan.plan import workload_of
from tests.support import ranks

NOW = StepSettings(lr=1e-3, weight_decay=0.04, ema_momentum=0.996)
TINY = {
    "data": {"batch_size": 8, "crop_size": 32, "num_workers": 0},
    "mask": {"patch_size": 8, "min_keep": 0, "truncate": "none"},
    "meta": {"model_name": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "pred_depth": 1, "pred_emb_dim": 24},
    "optimization": {"epochs": 6, "warmup": 1, "ema": [0.99, 1.0]},
    "logging": {"every": 2, "monitor_every": 4, "probe_every": 8},
    "runtime": {"dtype": "fp32", "device": "cpu", "threads": 1},
}


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def write_images(folder: Path, count: int) -> None:
    """Images of two classes, dark and light, in a folder each."""
    random = np.random.default_rng(0)
    for i in range(count):
        pixels = random.integers(0, 128, (6, 6, 3), dtype=np.uint8) + np.uint8(127 * (i % 2))
        (folder / "dl"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((40, 36)).save(folder / "dl"[i % 2] / f"{i:02}.png")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """48 labelled images, all of them for training: six steps an epoch."""
    directory = tmp_path_factory.mktemp("images")
    write_images(directory, 48)
    return directory


@pytest.fixture(scope="module")
def file(source, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"data": TINY["data"] | {"source": str(source)}}))
    return path


def trained(file: Path, output: Path, *arguments: object) -> list[dict]:
    assert main(["train", "--config", str(file), "--output", str(output), *map(str, arguments)]) == 0
    return lines(output)


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def readings(entries: list[dict]) -> list[tuple]:
    return [(entry["step"], *(entry.get(name) for name in READING_NAMES)) for entry in entries]


@given(st.integers(1, 8))
def test_effective_rank_of_equal_directions_is_their_number(k):
    features = torch.eye(8)[torch.arange(840) % k] * 3.0  # 840: a multiple of every k
    assert effective_rank(features) == pytest.approx(k, rel=1e-3)
    assert effective_rank(features.T) == pytest.approx(effective_rank(features), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_effective_rank_of_a_gaussian_in_a_subspace_is_its_dimension(rank):
    basis, _ = torch.linalg.qr(draws(64, rank))
    assert effective_rank(draws(2000, rank, seed=1) @ basis.T) == pytest.approx(rank, rel=0.02)


def test_effective_rank_is_the_entropy_of_the_singular_values():
    s = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    left, _ = torch.linalg.qr(draws(50, 4))
    p = s / s.sum()
    assert effective_rank((left * s).float()) == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-5)


def test_effective_rank_does_not_centre_and_says_what_it_cannot_measure():
    assert effective_rank(torch.ones(30, 5)) == pytest.approx(1.0, abs=1e-3)
    assert effective_rank(torch.zeros(30, 5)) == 0.0
    assert math.isnan(effective_rank(torch.full((30, 5), math.nan)))


def test_effective_rank_takes_evenly_spaced_rows_of_many():
    many = torch.zeros(3 * 2048, 4)
    many[::3, 0] = 1.0  # the rows taken
    many[1::3] = draws(2048, 4).float()
    assert effective_rank(many) == pytest.approx(1.0, abs=1e-3)


def test_spread_is_over_tokens_not_channels():
    assert feature_std(torch.tensor([[0.0, 5.0], [2.0, 5.0]])) == pytest.approx(0.5)
    assert feature_std(torch.arange(12.0).expand(7, 12).bfloat16()) == 0.0


@pytest.mark.parametrize("directions", [1, 3, 10])
def test_lidar_is_the_number_of_directions_that_tell_images_apart(directions):
    images = 100 * torch.nn.functional.pad(draws(2000, 1, directions), (0, 20 - directions))
    noise = draws(2000, 4, 20, seed=1)
    assert lidar(images + noise) == pytest.approx(directions, rel=0.05)


def test_lidar_sees_the_rank_that_rankme_mistakes_for_noise():
    """Views differ widely in 18 directions, images in 2: to RankMe there are 20."""
    images = torch.nn.functional.pad(30 * draws(2000, 1, 2), (0, 18))
    features = images + draws(2000, 4, 20, seed=1) * torch.tensor([1.0] * 2 + [30.0] * 18)
    assert effective_rank(features.flatten(0, 1)) > 15
    assert lidar(features) < 3


def test_lidar_is_the_papers_formula():
    x, d = draws(30, 5, 6), 6
    centres = x.mean(dim=1)
    within = sum(torch.outer(e - m, e - m) for views, m in zip(x, centres, strict=True) for e in views) / 150
    between = sum(torch.outer(m - x.mean((0, 1)), m - x.mean((0, 1))) for m in centres) / 30
    values, vectors = torch.linalg.eigh(within + 0.1 * torch.eye(d))
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    p = torch.linalg.eigvalsh(root @ between @ root)
    p = p / p.sum()
    assert lidar(x, delta=0.1) == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-4)


def test_lidar_of_what_it_cannot_measure_and_of_more_channels_than_views():
    assert lidar(torch.ones(8, 3, 5)) == 0.0
    assert math.isnan(lidar(torch.full((8, 3, 5), math.nan)))
    assert 1 <= lidar(draws(10, 2, 64)) <= 9.001


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_readings_do_not_depend_on_the_order(seed):
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    rows, views = draws(40, 8), draws(40, 3, 8)
    assert feature_std(rows[order]) == pytest.approx(feature_std(rows), rel=1e-6)
    assert effective_rank(rows[order]) == pytest.approx(effective_rank(rows), rel=1e-9)
    assert lidar(views[order]) == pytest.approx(lidar(views), rel=1e-9)
    assert lidar(views[:, [2, 0, 1]]) == pytest.approx(lidar(views), rel=1e-9)


def told(name: str, *values: float, losses=None, now: StepSettings = NOW, warmup_steps=0, **section) -> list[list[str]]:
    """The warnings after each of the readings `values`, 100 steps apart."""
    pairs = zip(values, losses or [0.3] * len(values), strict=True)
    history = [{"step": 100 * i, "loss": loss, name: value} for i, (value, loss) in enumerate(pairs)]
    config = config_from_dict(section)
    settings = AlarmSettings(config.optimization.lr, config.loss.regularizer != "none", warmup_steps)
    return [collapse_alarms(history[: n + 1], now, settings) for n in range(len(history))]


@pytest.mark.parametrize(
    "name, values, kind",
    [
        ("feature_std", (1.0, 0.2, 0.2, 0.1, 0.1), "complete collapse, every patch"),
        ("image_std", (1.0, 0.2, 0.2, 0.1, 0.1), "complete collapse, every image"),
        ("effective_rank", (40, 19, 19, 12, 3), "dimensional collapse, the features are shrinking"),
        ("lidar", (40, 19, 19, 12, 3), "dimensional collapse, few directions"),
        ("knn", (0.5, 0.505, 0.4, 0.5, 0.3), "stagnation"),
        ("feature_std", (1.0, math.nan, math.nan, math.nan, math.nan), "complete collapse"),
        ("feature_std", (1.0, None, None, None, None), "complete collapse"),  # as a resumed log has it
    ],
)
def test_every_kind_warns_once_at_its_second_bad_reading(name, values, kind):
    said = told(name, *values)
    assert [len(sentences) for sentences in said] == [0, 0, 1, 0, 0]
    assert said[2][0].startswith("step 200: ") and kind in said[2][0]


@pytest.mark.parametrize(
    "name, values",
    [
        ("feature_std", (1.0,)),
        ("feature_std", (1.0, 0.01)),  # one odd batch
        ("feature_std", (1.0, 0.01, 1.0, 0.01)),
        ("feature_std", (1.0, 0.3, 0.3, 0.3)),
        ("effective_rank", (40.0, 21.0, 21.0)),
        ("feature_std", (0.0, 0.0, 0.0)),
        ("knn", (0.5, 0.52, 0.52, 0.52)),
        ("knn", (1.0, 1.0, 1.0, 1.0)),  # nothing is left to learn of them
        ("lidar", (4.0, 8.0, 12.0)),
    ],
)
def test_no_false_alarm(name, values):
    assert not any(told(name, *values))
    assert collapse_alarms([], NOW, AlarmSettings(1e-3, False)) == []


def test_a_collapse_that_ended_and_came_back_warns_again():
    assert [len(said) for said in told("feature_std", 1.0, 0.1, 0.1, 0.9, 0.1, 0.1)] == [0, 0, 1, 0, 0, 1]


def test_a_k_nn_may_stand_still_until_the_warm_up_ends():
    assert [len(said) for said in told("knn", *[0.5] * 6, warmup_steps=250)] == [0, 0, 0, 0, 1, 0]
    short = [{"step": step, "loss": 0.3, "knn": 0.5} for step in (1, 34, 67, 99, 100, 101)]
    assert [len(collapse_alarms(short[: n + 1], NOW, AlarmSettings(1e-3, False))) for n in range(6)] == [0, 0, 0, 0, 0, 1], (
        "99 steps teach little"
    )


def test_a_reading_of_another_kind_between_repeats_nothing():
    low = [{"step": i, "loss": 0.3, "lidar": value} for i, value in enumerate((9.0, 1.0, 1.0))]
    assert len(collapse_alarms(low, NOW, AlarmSettings(1e-3, False))) == 1
    assert collapse_alarms([*low, {"step": 4, "loss": 0.3, "feature_std": 1.0}], NOW, AlarmSettings(1e-3, False)) == []


def test_a_loss_that_jumps_and_stays_names_the_learning_rate():
    said = told("feature_std", *[1.0] * 8, losses=[0.3, 0.2, 0.2, 0.2, 0.9, 0.9, 0.9, 0.9])
    assert [len(sentences) for sentences in said] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert "the loss jumped to 0.9" in said[5][0] and "lower optimization.lr" in said[5][0]
    assert not any(told("feature_std", *[1.0] * 8, losses=[0.3, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1]))
    assert not any(told("feature_std", *[1.0] * 6, losses=[0.3, 0.1, 0.15, 0.22, 0.3, 0.4])), "a slow rise is how I-JEPA learns"


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"now": StepSettings(1e-3, 0.04, 0.0)}, "raise optimization.ema (now 0)"),
        ({"optimization": {"lr": 0.1}}, "lower optimization.lr (peak 0.1)"),
        ({}, "set loss.regularizer=vicreg"),
        ({"loss": {"regularizer": "vicreg"}}, "raise loss.regularizer_weight"),
    ],
)
def test_the_likely_cause_decides_the_key(changes, key):
    assert key in told("feature_std", 1.0, 0.1, 0.1, **changes)[2][0]
    assert "10% of its value at the start, 1)" in told("feature_std", 1.0, 0.1, 0.1, **changes)[2][0]


def test_a_loss_that_jumped_before_a_collapse_is_its_likely_cause():
    said = told("feature_std", *[1.0] * 4, 0.1, 0.1, losses=[0.3, 0.2, 0.2, 0.2, 0.9, 0.2])
    assert "the steps are too large: lower optimization.lr" in said[5][0]


@given(st.integers(1, 400), st.integers(0, 500))
def test_a_run_is_probed_at_both_ends_and_twice_between_whatever_the_key_says(last, every):
    steps = [step for step in range(1, last + 1) if probe_falls(step, last, every)]
    if every == 0:
        assert steps == []
        return
    assert {1, last, *range(every, last + 1, every)} <= set(steps)
    assert len(steps) >= min(4, last) and len(steps) <= max(5, 2 + last // every)
    rest = [gap for gap in np.diff(steps) if gap > 0]
    assert max(rest, default=1) <= max(1, -(-(last - 1) // 3)) or max(rest) == every, "no long stretch is unwatched"


@pytest.mark.parametrize(
    "last, every, steps",
    [
        (1, 5, [1]),
        (2, 5, [1, 2]),
        (3, 5, [1, 2, 3]),
        (4, 2, [1, 2, 3, 4]),
        (10, 100, [1, 4, 7, 10]),
        (10, 4, [1, 4, 8, 10]),
        (2340, 2350, [1, 780, 1560, 2340]),
        (2340, 1500, [1, 780, 1500, 1560, 2340]),
    ],
)
def test_steps_of_probes(last, every, steps):
    assert [step for step in range(1, last + 1) if probe_falls(step, last, every)] == steps


def test_probes_fit_into_the_budget_or_are_the_fewest_of_the_smallest(file, source):
    settings = load_config(file, ["logging.probe_every=null"])
    data = open_source(settings.data.address)
    per_image = flops_per_image(workload_of(settings))
    images = 48 + 8 * 48  # bank and queries, views
    forward = count_flops(workload_of(settings), 1, 1, 16).target_forward / (8 * per_image)  # of an image, in steps
    for steps in (10, 1_000, 5_000, 30_000, 1_000_000):
        plan = plan_probes(settings, data, steps, per_image)
        looks = sum(map(plan.due, range(1, steps + 1)))
        assert looks >= FEWEST_PROBES and LEAST_SHARE <= plan.share <= 1
        assert looks * plan.share * images * forward <= 0.01001 * steps or (looks, plan.share) == (FEWEST_PROBES, LEAST_SHARE)
        assert plan.share == 1 or looks == FEWEST_PROBES, "a run too short takes four of fewer images"
    assert plan.every % 2 == 0 and plan.every >= 4 and plan.share == 1
    only_probes = load_config(file, ["logging.probe_every=null", "logging.monitor_every=0"])
    assert plan_probes(only_probes, data, 30_000, per_image).due(30_000), "each key has its own readings"
    assert plan_probes(load_config(file), data, 10, per_image).every == 8, "what was asked for"
    assert not plan_probes(load_config(file, ["logging.probe_every=0"]), data, 10, per_image).due(1), "never"


def test_a_smaller_probe_has_its_share_of_images(file):
    settings = load_config(file)
    data = open_source(settings.data.address)
    small = gather_probe(settings, data, LEAST_SHARE)
    assert len(small.bank) == 32 and len(small.queries) == 16 and len(small.views) == 8  # of 1024, 512, 64 an eighth, or all
    assert small.about == "a k-NN of 16 other training images"


def test_a_probe_holds_out_what_there_is(file, tmp_path):
    settings = load_config(file)
    probe = gather_probe(settings, open_source(settings.data.address))
    assert probe.about == "a k-NN of 16 other training images"
    assert len(probe.bank) == 32 and probe.views.shape == (48, 8, 3, 32, 32)
    assert not {image.numpy().tobytes() for image in probe.bank} & {image.numpy().tobytes() for image in probe.queries}
    write_images(tmp_path / "split/train", 12)
    write_images(tmp_path / "split/val", 6)
    (tmp_path / "split/train/d/00.png").write_bytes(b"not an image")
    split = load_config(file, [f"data.source={tmp_path / 'split'}"])
    probe = gather_probe(split, open_source(split.data.address))
    assert probe.about == "a k-NN of 6 val images" and len(probe.query_labels) == 6
    assert len(probe.views) == 11 and len(probe.bank) == len(probe.bank_labels), "a file that cannot be read is passed over"
    flat = load_config(file, [f"data.source={tmp_path / 'split/val/d'}"])
    probe = gather_probe(flat, open_source(flat.data.address))
    assert probe.about == "no k-NN, for there are no labelled images of two classes" and len(probe.bank) == 3
    found = probe.read(build_pair(flat)[1], flat, torch.device("cpu"))
    assert found.keys() == {"image_std", "image_rank", "lidar"}


def test_a_probe_classifies_what_can_be_told_apart(file):
    settings = load_config(file)
    probe = gather_probe(settings, open_source(settings.data.address))
    encoder = build_pair(settings)[1]
    assert probe.read(encoder, settings, torch.device("cpu"))["knn"] == 1.0, "dark and light"
    for parameter in encoder.parameters():
        torch.nn.init.zeros_(parameter)
    assert probe.read(encoder, settings, torch.device("cpu")) | {"knn": 0} == {
        "image_std": 0.0, "image_rank": 0.0, "lidar": 0.0, "knn": 0}  # fmt: skip
    encoder.norm.bias.data.fill_(math.nan)
    assert all(math.isnan(value) for value in probe.read(encoder, settings, torch.device("cpu")).values())


def test_a_run_logs_its_readings_and_their_cost_and_is_not_changed_by_them(file, tmp_path, capsys):
    entries = trained(file, tmp_path / "watched")
    at = {name: [entry["step"] for entry in entries if name in entry] for name in (*READING_NAMES, "monitor_share")}
    assert at["feature_std"] == at["effective_rank"] == at["ema_distance"] == at["monitor_share"] == [1, *range(4, 37, 4)], (
        "a line at each step with readings"
    )
    assert all(at[name] == [1, 8, 16, 24, 32, 36] for name in ("image_std", "image_rank", "lidar", "knn"))
    assert all(0 < entry["monitor_share"] < 1 for entry in entries if "monitor_share" in entry)
    out = capsys.readouterr().out
    assert out.count("probes after step 1, every 8 and step 36: a k-NN of 16 other training images") == 1
    assert "LiDAR" in out and "distance 0.99" in out and "k-NN 1" in out and "warning" not in out
    plain = trained(file, tmp_path / "plain", "logging.monitor_every=0", "logging.probe_every=0")
    assert not any(name in entry for entry in plain for name in READING_NAMES)
    first, second = (tmp_path / run / "checkpoints/jepa-00000036/target_encoder.safetensors" for run in ("watched", "plain"))
    assert all(torch.equal(tensor, load_file(second)[name]) for name, tensor in load_file(first).items())


def test_a_resumed_run_takes_the_same_readings(file, tmp_path, capsys):
    """It goes on just before step 12, whose update it could not know otherwise."""
    saving = ("logging.checkpoint_every=11", "logging.keep_last=9")
    whole = trained(file, tmp_path / "whole", "--max-steps", 20, *saving)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/jepa-00000020")
    parts = trained(file, tmp_path / "parts", "--max-steps", 20, *saving)
    assert "resuming from" in capsys.readouterr().out and readings(parts) == readings(whole)


def test_a_run_that_is_cut_short_is_probed_as_one_of_that_length(file, tmp_path, capsys):
    for stop in (3, 10):
        entries = trained(file, tmp_path, "--max-steps", stop, "logging.every=50", "logging.probe_every=50")
    assert [entry["step"] for entry in entries if "knn" in entry] == [1, 2, 3, 4, 7, 10]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 7, 8, 10], "each in a line of its own"
    assert "probes after steps 1, 4, 7, 10" in capsys.readouterr().out


FAST = ("optimization.ema=[0.0,0.0]", "optimization.lr=0.05", "optimization.start_lr=0.05", "optimization.final_lr=0.05")


def test_a_run_that_collapses_says_so_once_and_why(file, tmp_path, capsys):
    trained(file, tmp_path, *FAST, "--max-steps", 5)
    entries = trained(file, tmp_path, *FAST)  # goes on, and knows what was said
    warned = [line for line in capsys.readouterr().out.splitlines() if "warning" in line and "dimensional collapse" in line]
    assert len(warned) == 1
    assert "raise optimization.ema (now 0)" in warned[0]
    assert min(entry["effective_rank"] for entry in entries if "effective_rank" in entry) < 0.5 * entries[0]["effective_rank"]


def test_two_ranks_go_on_while_one_of_them_looks(file, tmp_path):
    done = ranks.succeeded(ranks.train(2, "--config", file, "--output", tmp_path, "data.batch_size=4"))
    assert [entry["step"] for entry in lines(tmp_path) if "knn" in entry] == [1, 8, 16, 24, 32, 36]
    assert done[0].stdout.count("probes after step 1") == 1
