"""Heartbeats between two real processes: who stopped is said by those who wait."""

import os
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch

from fastjepa.ranks.collectives import barrier, mean_over_ranks
from fastjepa.ranks.heartbeat import RANK_LOST, Heartbeat
from fastjepa.ranks.world import World, join_world, leave_world
from tests.support import ranks
from tests.support.ranks import LAUNCHER


def met() -> World:
    """Meet the other rank."""
    return join_world("cpu", timeout=240)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def sentences(function: Callable, codes: tuple[int, int], *arguments: object) -> list[str]:
    """Return what each of two ranks told of the other, after it ended with the code given."""
    done = ranks.ended(ranks.start(function, *arguments))
    assert tuple(process.returncode for process in done) == codes, [process.stderr for process in done]
    return ["".join(line for line in process.stderr.splitlines() if line.startswith("fastjepa train: ")) for process in done]


def test_one_rank_starts_no_thread_and_loses_no_batch():
    before = threading.active_count()
    with Heartbeat(World(0, 0, 1, torch.device("cpu")), timeout=1) as heart:
        assert list(heart.batches(iter("abc"))) == ["a", "b", "c"]
        assert threading.active_count() == before


def go_on() -> None:
    world = met()
    first = world.rank == 0
    with Heartbeat(world, timeout=1.0) as heart:
        for _ in range(12):
            time.sleep(0.25 if first else 0)
            heart.moves()
            mean_over_ranks(torch.ones(()))
    leave_world()


def test_ranks_that_go_on_are_left_alone_however_long_it_takes():
    assert sentences(go_on, (0, 0)) == ["", ""]


def compute_on() -> None:
    world = met()
    first = world.rank == 0

    def batches():
        if not first:
            time.sleep(60)
        yield 1

    with Heartbeat(world, timeout=1.5, step=41) as heart:
        for _ in heart.batches(batches()):
            barrier()


def test_a_rank_that_computes_on_is_not_the_one_that_waits_for_data():
    for said in sentences(compute_on, (RANK_LOST, RANK_LOST)):
        assert (
            "rank 1 (process " in said and "has stood still for 1.5 s after step 41, waiting for its next micro-batch" in said
        )


def come_late() -> None:
    world = met()
    first = world.rank == 0
    with Heartbeat(world, timeout=1.5) as heart:
        heart.finished(3)
        if first:
            time.sleep(60)
        mean_over_ranks(torch.ones(()))


def test_a_rank_that_comes_late_to_a_reduction_is_named_though_its_steps_are_as_many():
    for said in sentences(come_late, (RANK_LOST, RANK_LOST)):
        assert "rank 0 (process " in said and "after step 3, between two steps" in said


def stand_still() -> None:
    world = met()
    with Heartbeat(world, timeout=1.5):
        time.sleep(60)


def test_where_all_stand_still_none_is_blamed():
    for said in sentences(stand_still, (RANK_LOST, RANK_LOST)):
        assert "all 2 ranks have stood still for 1.5 s (runtime.timeout) after step 0" in said


def die(victim: int) -> None:
    world = met()
    with Heartbeat(world, timeout=20) as heart:
        heart.interval = 0.2
        time.sleep(1)  # until the other has begun to watch
        if world.rank == victim:
            os.kill(os.getpid(), 9)
        time.sleep(0.1)
        barrier()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_is_named_long_before_the_time_is_up(rank):
    said = sentences(die, (-9, RANK_LOST) if rank == 0 else (RANK_LOST, -9), rank)[1 - rank]
    assert f"rank {rank} (process " in said and "has given no sign of life after step 0" in said


def fail() -> None:
    world = met()
    first = world.rank == 0
    try:
        with Heartbeat(world, timeout=20, step=7) as heart:
            heart.interval = 0.2
            if first:
                raise ValueError("a broken image\n  of many words")
            time.sleep(6)
    except ValueError:
        time.sleep(3)
        sys.exit(3)


def test_an_error_of_one_rank_is_told_by_the_other():
    """Even where no collective notices, for the process that failed stays: NCCL would wait."""
    said = sentences(fail, (3, RANK_LOST))[1]
    assert "rank 0 (process " in said and "ended after step 7 with ValueError: a broken image of many words; mend that" in said


def fail_together() -> None:
    world = met()
    first = world.rank == 0
    try:
        with Heartbeat(world, timeout=20) as heart:
            heart.interval = 0.2
            time.sleep(0 if first else 0.4)
            raise ValueError("the same everywhere")
    except ValueError:
        time.sleep(1)
        sys.exit(3)


def test_an_error_of_all_ranks_stays_their_own():
    assert sentences(fail_together, (3, 3)) == ["", ""]


def raise_alone() -> None:
    world = met()
    first = world.rank == 0
    try:
        with Heartbeat(world, timeout=60):
            if first:
                time.sleep(30)  # a beat a second: a busy machine keeps no living rank from three of them
            else:
                raise RuntimeError("shapes do not agree")
    except RuntimeError as error:
        assert "shapes" in str(error)
        sys.exit(3)


@pytest.mark.slow
def test_a_runtime_error_with_all_peers_alive_is_raised():
    told = sentences(raise_alone, (RANK_LOST, 3))
    assert "rank 1 (process " in told[0] and "RuntimeError: shapes do not agree" in told[0] and told[1] == ""


def lose_the_store() -> None:
    first = met().rank == 0
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "" if first else "True"
    with Heartbeat(join_world("cpu"), timeout=2) as heart:
        until = time.monotonic() + (1 if first else 60)
        while time.monotonic() < until:  # both go on, so that nothing but the store can be missed
            heart.moves()
            time.sleep(0.05)
        os._exit(0)


def test_a_store_that_is_gone_ends_the_run():
    """torchrun's own process keeps the store; here rank 0 plays it and then goes, while rank 1 has nothing to wait for."""
    assert "the launcher that keeps the ranks together at 127.0.0.1:" in sentences(lose_the_store, (0, RANK_LOST))[1]
