"""The stage that `runtime.zero: auto` takes: judged by memory, said in a sentence, and the one that `plan` recommends."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from fastjepa.config.load import config_from_dict, load_config
from fastjepa.config.schema import Config
from fastjepa.plan.memory import ZERO_STAGES
from fastjepa.plan.plan import Cards, config_on_card, plan_run, workload_of
from fastjepa.plan.sharding import RESERVED_SHARE, STAGE_NAMES, choose_zero_stage, possible_stages
from fastjepa.ranks.memory import cgroup_limits, least_share, machine_memory_bytes, rank_memory_bytes
from fastjepa.ranks.world import World
from fastjepa.run.build import zero_stage

ONE = World(0, 0, 1, torch.device("cpu"))


def large(**runtime: object) -> Config:
    """A ViT-G, whose stages differ by gigabytes."""
    mask = {"truncate_group": 8, "patch_size": 28, "min_keep": 4}
    sections = {"data": {"batch_size": 8}, "mask": mask, "meta": {"model_name": "vit_gigantic"}, "runtime": runtime}
    return config_on_card(config_from_dict(sections))


def needs(config: Config, ranks: int, key: str = "total") -> dict[int, int]:
    return {stage: found[key] for stage, found in plan_run(config, Cards(ranks))["stages"].items()}


def memory_for(need: float) -> int:
    """The memory of a rank that has just so much to fill."""
    return int(need / (1 - RESERVED_SHARE)) + 1


def test_a_model_that_fits_is_plain_ddp_and_the_sentence_has_both_numbers():
    config = large()
    choice = choose_zero_stage(workload_of(config), 8, 80 * 10**9)
    assert (choice.stage, choice.fits) == (0, True)
    need = needs(config, 8)[0] / 1e9
    assert choice.why == f"runtime.zero: auto is 0 (plain DDP): about {need:.1f} of the 72.0 GB that a rank may fill are needed"


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_the_lowest_stage_that_fits_is_taken(stage: int):
    config = large()
    need = needs(config, 8)
    choice = choose_zero_stage(workload_of(config), 8, memory_for(need[stage]))
    assert (choice.stage, choice.fits) == (stage, True)
    below = STAGE_NAMES[stage - 1]
    assert stage == 0 or choice.why.endswith(f"are needed, where {below} needs {need[stage - 1] / 1e9:.1f}")


def test_where_nothing_fits_the_stage_that_needs_least_is_taken_with_the_remedy():
    choice = choose_zero_stage(workload_of(large()), 8, 10**9)
    assert (choice.stage, choice.fits) == (3, False)
    assert "more than the 0.90 GB that a rank may fill; lower runtime.micro_batch, set runtime.checkpoint" in choice.why
    assert "checkpoint_activations" not in choose_zero_stage(workload_of(large(checkpoint_activations=True)), 8, 10**9).why


def test_checkpointed_activations_let_plain_ddp_fit():
    memory = memory_for(needs(large(), 8, "total_checkpointed")[0])
    assert choose_zero_stage(workload_of(large()), 8, memory).stage > 0
    assert choose_zero_stage(workload_of(large(checkpoint_activations=True)), 8, memory).stage == 0


def test_a_compiled_run_never_takes_stage_3():
    """Which the engine would refuse."""
    assert possible_stages(workload_of(large(compile=True)), 8) == (0, 1, 2)
    assert choose_zero_stage(workload_of(large(compile=True)), 8, 10**9).stage < 3


def test_one_rank_shards_nothing_and_is_told_only_of_what_does_not_fit():
    assert choose_zero_stage(workload_of(large()), 1, 80 * 10**9)[:2] == (0, True)
    choice = choose_zero_stage(workload_of(large()), 1, 10**9)
    assert choice[:2] == (0, False) and "auto is 0 (one rank shards nothing): about" in choice.why
    small = config_from_dict({"meta": {"model_name": "vit_tiny"}, "data": {"batch_size": 2}, "runtime": {"dtype": "fp32"}})
    assert zero_stage(small, ONE) == (0, [])
    endless = dataclasses.replace(small, meta=dataclasses.replace(small.meta, model_name="vit_gigantic", depth=100_000))
    stage, notes = zero_stage(endless, ONE)
    assert stage == 0 and len(notes) == 1 and "more than" in notes[0]


def test_a_stage_that_the_config_names_is_taken_without_a_word():
    assert [zero_stage(large(zero=stage), ONE) for stage in ZERO_STAGES] == [(stage, []) for stage in ZERO_STAGES]


@pytest.mark.parametrize(("ranks", "runtime"), [
    (1, {}), (2, {}), (8, {}), (8, {"checkpoint_activations": True}), (8, {"compile": True}), (2, {"micro_batch": 4}),
])  # fmt: skip
def test_the_plan_recommends_what_a_run_takes(ranks: int, runtime: dict):
    """At every memory; where the plan asks for a change of the config, the run with that change takes its stage."""
    config = large(**runtime)
    every = {memory_for(need) for key in ("total", "total_checkpointed") for need in needs(config, ranks, key).values()}
    for memory in every | {10**10, 10**11}:
        found, choice = plan_run(config, Cards(ranks, memory / 1e9)), choose_zero_stage(workload_of(config), ranks, memory)
        if choice.fits:
            assert found["recommended_stage"] == choice.stage
        elif found["recommended_stage"] is not None:
            words = dict(word.rstrip(":").split("=") for word in found["why"].split() if word.startswith("runtime."))
            asked = {name.removeprefix("runtime."): value == "true" or int(value) for name, value in words.items()}
            assert choose_zero_stage(workload_of(large(**runtime | asked)), ranks, memory)[:2] == (
                found["recommended_stage"],
                True,
            )


def test_the_presets_that_the_mission_shards_say_so():
    names = ("vit_huge14", "vit_huge16_448", "vit_giant16", "vit_gigantic14")
    assert [load_config(name).runtime.zero for name in names] == [1] * 4
    assert [load_config(name).runtime.zero for name in ("vit_base16", "vit_large16")] == ["auto"] * 2


def test_ranks_share_the_memory_of_their_machine():
    assert least_share([("a", 64)]) == 64
    assert least_share([("a", 64), ("a", 64), ("b", 24)]) == 24
    assert least_share([("a", 64), ("a", 64), ("b", 48)]) == 32
    assert rank_memory_bytes(torch.device("cpu")) == machine_memory_bytes()


def test_a_container_is_as_large_as_its_tightest_limit(tmp_path: Path):
    """Files as Linux writes them: version 2, a job inside a limited group; version 1, one with no limit of its own."""
    (tmp_path / "proc/self").mkdir(parents=True)
    groups, listed = tmp_path / "sys/fs/cgroup", tmp_path / "proc/self/cgroup"
    for group, limit in (("", "max"), ("job", "4000000000"), ("job/step", "max")):
        (groups / group).mkdir(parents=True, exist_ok=True)
        (groups / group / "memory.max").write_text(limit + "\n")
    listed.write_text("0::/job/step\n")
    assert cgroup_limits(tmp_path) == [4_000_000_000]
    (groups / "memory/job").mkdir(parents=True)
    (groups / "memory/memory.limit_in_bytes").write_text("3000000000\n")
    (groups / "memory/job/memory.limit_in_bytes").write_text("9223372036854771712\n")
    listed.write_text("4:cpu,cpuacct:/job\n7:memory:/job\n")
    assert cgroup_limits(tmp_path) == [9223372036854771712, 3_000_000_000]
    listed.unlink()
    assert cgroup_limits(tmp_path) == []


def test_no_limit_makes_a_machine_larger_than_it_is():
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < machine_memory_bytes() <= physical
