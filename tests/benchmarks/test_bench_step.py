"""benchmarks/step.py and what it stands on: the timing protocol, the work both contenders get, and the official adapter.

The official code is not here: a stand-in with its interface, written over dense tensors, takes its place.
"""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import breakdown
import numpy as np
import official
import pytest
import step
import timing
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from work import Work

from fastjepa.config.schema import Config
from fastjepa.errors import UserError
from fastjepa.masks.pack import pack
from fastjepa.plan.flops import flops_of_packed
from fastjepa.plan.plan import workload_of

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")
SMALL = [
    "--device=cpu",
    "--model=vit_tiny",
    "--size=64",
    "--batch=4",
    "meta.pred_depth=2",
    "mask.patch_size=8",
    "mask.min_keep=4",
]
SMALL += ["meta.pred_emb_dim=48"]
SHALLOW = [*SMALL, "meta.depth=2"]
ROOMY = "mask.enc_mask_scale=[0.5, 0.6]"  # so that two contexts of an image differ


def config_of(*arguments: str) -> Config:
    return step.to_config(step.parse_options(list(arguments)))


def test_spread_is_median_p20_p80():
    assert timing.Spread.of([5.0, 1.0, 4.0, 2.0, 3.0, 0.0]) == timing.Spread(2.5, 1.0, 4.0)
    assert timing.Spread.of([7.0]) == timing.Spread(7.0, 7.0, 7.0)


def test_ratio_is_paired_within_rounds():
    """A machine that slows down tenfold in the second round changes no round's ratio."""
    assert timing.paired_ratio([1.0, 10.0, 1.0], [2.0, 20.0, 2.0]) == timing.Spread(2.0, 2.0, 2.0)


def test_interleave_takes_turns_and_drops_the_warmup():
    calls = []

    def slow(number: int) -> None:
        calls.append(("slow", number))
        time.sleep(0.02)

    seconds = timing.interleave({"slow": slow, "fast": lambda number: calls.append(("fast", number))}, 3, CPU, warmup=1)
    assert calls == [("slow", 0), ("fast", 0), ("slow", 0), ("fast", 0), ("fast", 1), ("slow", 1), ("slow", 2), ("fast", 2)]
    assert {name: len(taken) for name, taken in seconds.items()} == {"slow": 3, "fast": 3}
    assert min(seconds["slow"]) >= 0.02


def test_the_steps_of_a_round_go_on_from_the_round_before_and_count_by_their_mean():
    calls = []

    def run(number: int) -> None:
        calls.append(number)
        time.sleep(0.03 if number % 2 else 0.01)

    seconds = timing.interleave({"run": run}, 2, CPU, warmup=1, steps=2)["run"]
    assert calls == [0, 1, 0, 1, 2, 3]
    assert len(seconds) == 2 and 0.02 <= min(seconds) < 0.04


def test_clock_adds_up_marks_of_one_name():
    clock = timing.PhaseClock(CPU)
    for name, seconds in (("a", 0.01), ("b", 0.03), ("a", 0.01)):
        time.sleep(seconds)
        clock.mark(name)
    phases = clock.read()
    assert list(phases) == ["a", "b"]
    assert phases["a"] >= 20 and phases["b"] >= 30


def test_ceiling_is_the_best_rate_of_its_products(monkeypatch: pytest.MonkeyPatch):
    """With half a second for every product, the largest shape sets the rate: 2 x 64 x 32 x 16 FLOPs."""
    monkeypatch.setattr(timing, "seconds_of", lambda product, device: product() is None or 0.5)
    ceiling = timing.Ceiling([(64, 32, 16), (8, 8, 8)], torch.float32, CPU)
    ceiling(7)
    assert ceiling.rates == {7: 2 * 64 * 32 * 16 / 0.5}


def holds(megabytes: int) -> int:
    """Peak of a run that holds two tensors at once and then lets them go."""

    def build():
        kept = torch.ones(megabytes * 2**18)  # 4 bytes each
        return lambda number: float((kept + number).sum())

    return timing.peak_bytes(build, CPU)


def test_peak_is_what_was_held_at_once():
    ballast = torch.ones(2**27)  # half a gigabyte of this process, which the fresh one does not inherit
    grown = timing.in_fresh_process(holds, 100)
    assert ballast[0] == 1
    assert 200 <= grown / 2**20 < 260


def test_a_killed_process_is_an_error():
    with pytest.raises(UserError, match="was killed"):
        timing.in_fresh_process(os._exit, 1)


@given(st.data())
def test_indices_are_the_first_patches_of_each_mask(data: st.DataObject):
    b, m, n = (data.draw(st.integers(1, top)) for top in (4, 3, 12))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=b * m * n, max_size=b * m * n))).reshape(b, m, n)
    mask[..., 0] = True
    work = Work(torch.zeros(b), mask, mask)
    found = work.indices(mask)
    shortest = min(int(mask[i, k].sum()) for i in range(b) for k in range(m))
    expected = [[np.flatnonzero(mask[i, k])[:shortest].tolist() for i in range(b)] for k in range(m)]
    assert [idx.tolist() for idx in found] == expected


def test_micro_batches_are_the_batch_in_pieces():
    whole, pieces = (config_of(*SHALLOW, "--dtype=fp32", f"runtime.micro_batch={size}") for size in (4, 2))
    work = Work.draw(whole, CPU, 0)
    losses = [float(step.OurStep(config, CPU, [work])(0)) for config in (whole, pieces)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(work.packed(pieces)) == 2


@pytest.fixture(scope="module")
def result() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(timing.SQUARE, "cpu", 128)
        patch.setattr(timing, "in_fresh_process", lambda function, *args: 2**20)  # a test of its own has a real one
        (row,) = step.measure_step(config_of(*SHALLOW, "--dtype=fp32"), rounds=2)
    return row


def test_result_holds_what_was_promised(result: dict):
    assert (result["contender"], result["dtype"], result["peak_bytes"]) == ("fastjepa", "fp32", 2**20)
    assert result["images_per_s"] == pytest.approx(4 / result["ms"] * 1000)
    assert 0 < result["mfu"] < 1.5 and result["gemm_gflops"] > 0
    assert list(result["phases"]) == list(breakdown.PARTS[1:])  # nothing waits for data
    assert min(result["phases"].values()) > 0


def test_flops_are_those_of_the_batches_timed(result: dict):
    config = config_of(*SHALLOW, "--dtype=fp32")
    works = [Work.draw(config, CPU, number) for number in range(2)]
    each = [flops_of_packed(workload_of(config), *pack(work.context_mask, work.target_mask)).total for work in works]
    assert result["gflop_per_image"] == pytest.approx(np.mean(each) / 1e9)


def test_command_prints_json_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def measure(config: Config, rounds: int, directory: str | None) -> list[dict]:
        print("chatter")
        return [{"rounds": rounds, "dtype": config.runtime.dtype, "directory": directory}]

    monkeypatch.setattr(step, "measure_step", measure)
    asked = [*SHALLOW, "--rounds=3", "--dtype=fp32", "--reference=there"]
    assert step.main([*asked, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == [{"rounds": 3, "dtype": "fp32", "directory": "there"}]
    assert printed.err == "chatter\n"
    assert step.main(asked) == 0
    assert "dtype                       fp32\n" in capsys.readouterr().out


@pytest.mark.slow
def test_command_runs_as_a_script():
    """A micro-batched run of the real thing, from any directory."""
    command = [sys.executable, str(BENCHMARKS / "step.py"), *SHALLOW, "--rounds=1", "--threads=1", "--json"]
    run = subprocess.run([*command, "runtime.micro_batch=2"], capture_output=True, text=True, check=True, cwd="/")
    assert json.loads(run.stdout)[0]["images_per_s"] > 0


@pytest.mark.parametrize(
    "wrong, named",
    [
        (["runtime.dtypo=fp32"], "dtypo"),
        (["mask.min_keep=60"], "min_keep"),
        (["--reference=nowhere", "meta.depth=null"], "nowhere: no src/helper.py"),
    ],
)
def test_a_mistake_is_a_sentence(wrong: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    assert step.main([*SHALLOW, *wrong]) == 2
    assert named in capsys.readouterr().err


def official_step(directory: Path) -> step.OfficialStep:
    config = config_of(*SMALL, "--dtype=fp32")
    return step.OfficialStep(config, CPU, [Work.draw(config, CPU, number) for number in range(2)], str(directory))


@pytest.mark.parametrize("contexts, truncate, dtype", [(1, "none", "bf16"), (2, "batch_min", "fp32")])
def test_both_take_the_same_steps(stand_in: Path, contexts: int, truncate: str, dtype: str):
    """Whatever is timed, what is compared is fp32 on equal work."""
    config = config_of(*SMALL, ROOMY, f"mask.truncate={truncate}", f"--dtype={dtype}", f"mask.num_enc_masks={contexts}")
    step.insist_on_equal_losses(config, CPU, str(stand_in))


def other_context(self: Work, mask: np.ndarray) -> list[Tensor]:
    """The right targets, but the context's first patch replaced by one that it does not hold."""
    indices = right_indices(self, mask)
    if mask is self.context_mask:
        indices[0][:, 0] = torch.from_numpy((~mask[:, 0]).argmax(axis=1))
    return indices


right_indices = Work.indices


def raw_targets(self: official.Official, images: Tensor, context_idx: list[Tensor], target_idx: list[Tensor]) -> Tensor:
    return self.masks.apply_masks(self.target_encoder(images).detach(), target_idx)


@pytest.mark.parametrize(
    "owner, name, wrong",
    [
        (Work, "indices", other_context),
        (official.Official, "targets", raw_targets),
        (official.Official, "backward_and_step", lambda self, loss, mark: loss.backward()),
    ],
    ids=["one patch of the context", "targets without layer norm", "weights never stepped"],
)
def test_other_work_is_refused(stand_in: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, wrong):
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(UserError, match="losses differ at step"):
        step.insist_on_equal_losses(config_of(*SMALL, ROOMY), CPU, str(stand_in))


def test_the_official_code_is_a_second_row(stand_in: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "in_fresh_process", lambda function, *args: 2**20)
    ours, theirs = step.measure_step(config_of(*SMALL, "--dtype=fp32", "--batch=2"), 2, str(stand_in))
    assert (ours["contender"], theirs["contender"]) == ("fastjepa", "official")
    assert ours["ratio"]["p20"] <= ours["ratio"]["median"] <= ours["ratio"]["p80"] and "ratio" not in theirs


def test_the_average_follows_at_the_first_momentum(stand_in: Path):
    run = official_step(stand_in)
    theirs = run.official
    before = theirs.target_encoder.norm.weight.clone()
    run(0)
    moved = theirs.target_encoder.norm.weight - before
    assert torch.allclose(moved, (1 - 0.996) * (theirs.encoder.norm.weight - before), atol=1e-7)
    assert moved.abs().max() > 0


def test_their_phases_are_ours_with_one_backward_and_the_gradient_norms(stand_in: Path):
    assert list(official_step(stand_in).phases(0)) == [
        "target forward", "context forward", "predictor forward", "loss", "backward", "optimizer", "grad_norms", "EMA",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "override, named",
    [
        ("meta.depth=2", "networks have the shapes"),
        ("meta.pred_num_heads=4", "pred_num_heads"),
        ("meta.model_name=vit_gigantic", "no such network"),
        ("data.crop_size=[64, 72]", "square"),
        ("data.channels=1", "3 channels"),
        ("loss.kind=l2", "smooth_l1 alone"),
        ("runtime.micro_batch=2", "whole batches"),
    ],
)
def test_what_the_official_code_cannot_do_is_refused(clone: Path, override: str, named: str):
    with pytest.raises(UserError, match=named):
        official.refuse_config(clone, config_of(*SMALL, override))
    official.refuse_config(clone, config_of(*SMALL))


def test_loading_a_clone_leaves_no_trace(clone: Path, capsys: pytest.CaptureFixture[str]):
    """Nothing printed, and sys.path, sys.modules (someone else's `src` included) and the root logger as they were."""
    mine = sys.modules["src"] = SimpleNamespace()
    root, path = logging.getLogger(), sys.path[:]
    root.handlers.clear()  # pytest's own would keep basicConfig from acting
    logger = root.handlers[:], root.level, logging.root.manager.disable
    try:
        loaded = official.import_clone(clone)
        assert [module.name for module in loaded] == list(official.MODULES)
        assert sys.modules["src"] is mine
        assert not any(name.startswith("src.") for name in sys.modules)
    finally:
        del sys.modules["src"]
    assert (sys.path, (root.handlers[:], root.level, logging.root.manager.disable)) == (path, logger)
    assert capsys.readouterr() == ("", "")


def test_a_clone_that_cannot_be_imported_is_named(clone: Path):
    (clone / "src" / "helper.py").write_text("import no_such_module_anywhere\n")
    with pytest.raises(UserError, match="no_such_module_anywhere"):
        official.import_clone(clone)
    assert not any(name.startswith("src.") for name in sys.modules)
