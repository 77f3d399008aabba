"""benchmarks/growth.py: exponents of what was measured and of the maths, on made-up costs and on one small real run."""

import json
import os
import sys
from pathlib import Path

import growth
import numpy as np
import pytest
import sharded
import step
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.errors import UserError
from fastjepa.masks.check import check_masks
from fastjepa.masks.draw import draw_masks
from fastjepa.masks.layouts import Masking
from fastjepa.masks.pack import pack
from fastjepa.model.jepa import NetworkShape
from fastjepa.plan.flops import flops_of_packed
from fastjepa.plan.memory import activation_bytes, network_sizes, row_counts
from fastjepa.plan.plan import workload_of

CPU = torch.device("cpu")
VALUES = (4, 8, 16, 32)
SMALL = ["--device=cpu", "--dtype=fp32", "--threads=1", "--rounds=2", "data.crop_size=32", "data.batch_size=2",
         "mask.truncate_group=2", "mask.patch_size=4", "mask.min_keep=1", "meta.pred_depth=1", "meta.pred_emb_dim=24",
         "meta.embed_dim=48", "meta.num_heads=3", "meta.depth=2"]  # fmt: skip


@given(st.floats(-2, 3), st.floats(1e-6, 1e6))
def test_an_exact_power_is_found(exponent: float, factor: float):
    found = growth.fit_exponent(VALUES, [factor * value**exponent for value in VALUES])
    assert found == pytest.approx((exponent, 0), abs=1e-6)


def test_the_error_is_that_of_the_scatter():
    """In 400 fits through costs that scatter by 5 %, the exponents scatter as each says of itself."""
    draw = np.random.default_rng(0)
    fits = [growth.fit_exponent(VALUES, np.array(VALUES) * np.exp(0.05 * draw.standard_normal(4))) for _ in range(400)]
    said = np.sqrt(np.mean([stderr**2 for _, stderr in fits]))
    assert np.std([exponent for exponent, _ in fits]) == pytest.approx(said, rel=0.15)


@pytest.mark.parametrize(
    "cost, too_fast",
    [
        (lambda x: x, False),
        (lambda x: x**0.5, False),
        (lambda x: 100 + x, False),  # a fixed cost hides growth, which is no growth
        (lambda x: x * np.log(1000 * x), False),  # a sort
        (lambda x: x**2, True),
        (lambda x: x + x**2 / 8, True),
        (lambda x: x**1.2, True),
    ],
)
def test_what_grows_faster_than_the_maths_is_flagged(cost, too_fast: bool):
    row = growth.growth_row("made up", "ms", "batch", VALUES, [cost(value) for value in VALUES], VALUES)
    assert row["too_fast"] == too_fast
    assert row["of_the_maths"] == pytest.approx(1)
    assert row["excess"] == pytest.approx(row["exponent"] - 1)


def test_growth_that_the_maths_have_too_is_not_flagged():
    """Attention's square is in the FLOPs."""
    squares = [value**2 for value in VALUES]
    assert not growth.growth_row("made up", "ms", "tokens", VALUES, squares, squares)["too_fast"]
    assert growth.growth_row("made up", "ms", "tokens", VALUES, [value**3 for value in VALUES], squares)["too_fast"]


def test_a_fit_that_could_be_anything_is_not_flagged():
    row = growth.growth_row("made up", "ms", "batch", VALUES, [1.0, 40.0, 2.0, 50.0], VALUES)
    assert row["excess"] > growth.TOLERANCE / 2 and not row["too_fast"]


def test_the_least_of_the_rounds_counts(monkeypatch: pytest.MonkeyPatch):
    """A round of each value was disturbed; a quadratic cost is found all the same."""
    taken = {i: [value**2 / 1000, value**2 / 1000 + 0.05, 5.0] for i, value in enumerate(VALUES)}
    monkeypatch.setattr(growth.timing, "interleave", lambda runs, rounds, device: taken)
    points = [growth.Point(value, lambda number: None, value) for value in VALUES]
    (row,) = growth.time_points("square", "side", points, 3, CPU)
    assert row["too_fast"] and row["exponent"] == pytest.approx(2) and row["measured"] == [16, 64, 256, 1024]


@pytest.mark.parametrize(
    "axis, value, changed",
    [
        ("batch", 6, (6, 64, 48, 2)),
        ("tokens", 48, (2, 144, 48, 2)),
        ("width", 96, (2, 64, 96, 2)),
        ("depth", 5, (2, 64, 48, 5)),
    ],
)
def test_along_an_axis_one_thing_changes(axis: str, value: int, changed: tuple):
    config = growth.to_config(growth.parse_options(SMALL))
    x, config = growth.along(config, axis, value)
    dim, depth, heads, _ = config.encoder_shape
    assert (config.data.batch_size, int(np.prod(config.grid)), dim, depth) == changed
    assert x == {"batch": 6, "tokens": 144, "width": 96, "depth": 5}[axis]
    assert dim % heads == 0 and config.data.batch_size % config.mask.truncate_group == 0


def test_masks_can_be_drawn_at_every_default_value():
    options = growth.parse_options([])
    values = {"batch": options.batch, "tokens": options.size, "width": options.width, "depth": options.depth}
    for axis, value in ((name, one) for name in values for one in values[name]):
        config = growth.along(growth.to_config(options), axis, value)[1]
        check_masks(Masking.of(config), config.data.batch_size)


def test_the_maths_of_a_step_are_flops_and_memory():
    config = growth.to_config(growth.parse_options(SMALL))
    point = growth.step_point(config, "batch", 4, CPU)
    _, config = growth.along(config, "batch", 4)
    drawn = [draw_masks(Masking.of(config), number, range(4), 4) for number in range(step.DISTINCT)]
    each = [4 * flops_of_packed(workload_of(config), *pack(*one)).total for one in drawn]
    assert point.work == pytest.approx(np.mean(each))
    size = network_sizes(NetworkShape.of(config))
    states = 4 * (4 * size.trained + size.encoder)
    held = activation_bytes(workload_of(config), row_counts(workload_of(config), 4))
    assert point.counted == states + held.saved + held.loss


def test_a_real_run_of_everything_but_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Every part of the host is there, and a step along its batch; sizes that are exact have exact exponents."""
    sizes = ["--batch=2,4,8", "--depth=1,2,4", "--drawn=8,16,32"]
    monkeypatch.setattr(growth.step, "peak_of_contender", lambda config, *rest: 10**6 * config.data.batch_size)
    monkeypatch.setattr(growth.timing, "in_fresh_process", lambda function, *args: function(*args))
    names = "batch,masks,packing,checkpoint"
    assert growth.main([*SMALL, *sizes, f"--along={names}", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["cost"], row["quantity"]) for row in rows] == [
        ("step", "ms"), ("step", "bytes"), ("drawing masks", "ms"), ("packing", "ms"), ("checkpoint", "ms"),
        ("checkpoint", "bytes"),
    ]  # fmt: skip
    by_name = {(row["cost"], row["quantity"]): row for row in rows}
    assert by_name["step", "bytes"]["exponent"] == pytest.approx(1)
    assert by_name["checkpoint", "bytes"]["excess"] == pytest.approx(0, abs=0.2)  # json and headers beside the numbers
    for row in rows:
        assert row["dtype"] == "fp32" and len(row["measured"]) == len(row["values"]) == 3 and min(row["measured"]) > 0


@pytest.mark.slow
def test_memory_and_ranks_in_processes_of_their_own(capsys: pytest.CaptureFixture[str]):
    """The state of a rank does not grow with ranks."""
    assert growth.main([*SMALL, "--rounds=1", "--along=ranks", "--ranks=1,2,3", "--json"]) == 0
    times, state = json.loads(capsys.readouterr().out)
    assert (times["against"], state["cost"], state["exponent"]) == ("ranks", "state", pytest.approx(0))
    assert len(set(state["measured"])) == 1 and min(times["measured"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "end, said",
    [
        ("raise RuntimeError(f'rank {place.rank} is tired')", "RuntimeError: rank 1 is tired"),
        ("os.kill(os.getpid(), 9)", r"rank : 1 \(local_rank: 1\); exitcode : -9"),
    ],
)
def test_what_ended_a_rank_is_said(end: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not that torchrun has noticed it."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, time\nfrom fastjepa.ranks.world import join_world\nplace = join_world('cpu', timeout=240)\n"
        f"if place.rank == 1:\n    {end}\ntime.sleep(240)\n"
    )
    monkeypatch.setattr(sharded, "__file__", str(worker))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with pytest.raises(UserError, match=f"stage 0 on 2 ranks failed: .*{said}"):
        sharded.start_ranks(growth.to_config(growth.parse_options(SMALL)), 0, 2)


@pytest.mark.parametrize(
    "wrong, named",
    [(["--batch=4,8"], "at least 3"), (["--batch=0,1,2"], "above 0"), (["--along=sideways"], "none of batch")],
)
def test_a_mistake_is_a_sentence(wrong: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        growth.parse_options([*SMALL, *wrong])
    assert named in capsys.readouterr().err


def test_fits_without_scipy_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(UserError, match=r"pip install 'fastjepa\[bench\]'"):
        growth.growth_row("made up", "ms", "batch", VALUES, VALUES, VALUES)


def test_a_config_that_cannot_be_is_a_sentence(capsys: pytest.CaptureFixture[str]):
    assert growth.main([*SMALL, "--along=width", "--width=33,66,99"]) == 2
    assert "a width divisible by 4, not 33" in capsys.readouterr().err
