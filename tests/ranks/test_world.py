"""One process alone, and two real ones over gloo."""

import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fastjepa.errors import ConfigError, UserError
from fastjepa.ranks import world
from fastjepa.ranks.collectives import (
    all_gather,
    all_gather_later,
    barrier,
    max_over_ranks,
    mean_over_ranks,
    text_of_main,
    union_of_names,
)
from fastjepa.ranks.meet import meet_ranks
from fastjepa.ranks.world import World, group_backends, join_world, leave_world, wait_for_ranks
from tests.support import ranks
from tests.support.ranks import LAUNCHER


def reductions() -> None:
    warnings.simplefilter("error", FutureWarning)
    place = join_world("cpu", timeout=240)
    rank = place.rank
    assert (place.size, place.local_rank, place.device.type) == (2, rank, "cpu") and place.is_main == (rank == 0)
    rows = torch.full((3, 2), float(rank), requires_grad=True)
    gathered = all_gather(rows.t().contiguous().t())  # not contiguous
    assert gathered.tolist() == [[0.0, 0.0]] * 3 + [[1.0, 1.0]] * 3 and not gathered.requires_grad
    whole = torch.full((6,), -1.0)
    own = whole[3 * rank :][:3].fill_(rank)
    assert all_gather(own, into=whole) is whole and whole.tolist() == [0.0] * 3 + [1.0] * 3  # in place
    first, second = (all_gather_later(torch.full((1,), float(rank + more))) for more in (0, 10))  # two under way
    assert (second().tolist(), first().tolist()) == ([10.0, 11.0], [0.0, 1.0])
    mine = torch.tensor([1.0, 10.0]) * (rank + 1)
    assert mean_over_ranks(mine).tolist() == [1.5, 15.0]
    assert mine.tolist() == [1.0 * (rank + 1), 10.0 * (rank + 1)], "mean must not change its argument"
    assert mean_over_ranks(torch.tensor(rank)).item() == 0.5
    assert text_of_main(["runs/a é", "b"][rank]) == "runs/a é"
    assert union_of_names([{"b", "a"}, {"a", "longer"}][rank]) == ["a", "b", "longer"]
    assert max_over_ranks([15, 0][rank]) == 15
    assert join_world("cpu") == place  # a second call joins nothing
    barrier()
    leave_world()
    assert not dist.is_initialized()


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def test_a_process_alone_is_the_main_rank_and_leaves_the_world_alone():
    before = dict(os.environ)
    place = join_world("cpu")
    assert place == World(0, 0, 1, torch.device("cpu")) and place.is_main
    assert not dist.is_initialized() and dict(os.environ) == before


def test_a_launcher_with_one_rank_makes_no_process_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join_world("cpu").size == 1
    assert not dist.is_initialized()


def test_reductions_of_one_process_are_identities():
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(all_gather(rows), rows) and torch.equal(all_gather_later(rows)(), rows)
    assert torch.equal(mean_over_ranks(rows), rows)
    assert text_of_main("run") == "run" and max_over_ranks(2) == 2
    assert union_of_names({"b", "a"}) == ["a", "b"]
    barrier()
    leave_world()


def test_two_ranks_gather_in_rank_order_and_average():
    ranks.run(reductions)


def meet_nobody() -> None:
    with pytest.raises(UserError) as refused:
        join_world("cpu", timeout=1)
    said = str(refused.value)
    assert "rank 0 of 2" in said and "127.0.0.1" in said and "\n" not in said, said


def test_a_rank_that_never_comes_is_one_sentence_that_names_the_address():
    ranks.run(meet_nobody, count=1, world=2)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_that_are_started_again_meet_each_other_and_not_the_dead(monkeypatch, count):
    """torchrun --max-restarts keeps one store, and who comes back first finds there the addresses of the ranks before."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in zip(LAUNCHER[3:], ("127.0.0.1", server.port), strict=True):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def found(start: int, rank: int, late: int) -> list[bytes]:
        time.sleep(0.3 if rank == late else 0)
        store = meet_ranks(rank, count, timeout=20)
        store.set(f"address/{rank}", str(start))
        return store.multi_get([f"address/{other}" for other in range(count)])

    with ThreadPoolExecutor(count) as pool:
        for start, late in enumerate([None, *range(count)]):
            seen = list(pool.map(found, [start] * count, range(count), [late] * count))
            assert seen == [[str(start).encode()] * count] * count


def test_a_rank_that_finds_only_the_dead_says_so_in_time(monkeypatch):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    server.set("present", "those before")
    environment = ("1", "1", "2", "127.0.0.1", str(server.port))
    for name, value in (*zip(LAUNCHER, environment, strict=True), ("TORCHELASTIC_USE_AGENT_STORE", "True")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"rank 1 of 2 could not meet .* within 0\.5 s; .* \[those who are in the store"):
        join_world("cpu", timeout=0.5)


def test_a_rank_lingers_for_the_others_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(world, "_store", dist.HashStore())
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    begun = time.monotonic()
    wait_for_ranks(0.5)
    assert time.monotonic() - begun >= 0.5
    wait_for_ranks(60)  # the second of two
    assert time.monotonic() - begun < 30


def test_a_group_reduces_tensors_of_the_host_and_of_the_card():
    card = torch.device("cuda", 3)
    assert group_backends(card) == {"backend": "cpu:gloo,cuda:nccl", "device_id": card}
    assert group_backends(torch.device("cpu")) == {"backend": "gloo"}


def test_cuda_without_a_gpu_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"runtime\.device: cuda .* set runtime\.device=cpu"):
        join_world("cuda")
    assert join_world("auto").device.type == "cpu"


@pytest.fixture
def cards(monkeypatch):
    """Let this process be local rank 1 of 2 that sees so many cards; return the devices that were made current."""
    current = []
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(world, "_join", lambda place, timeout: None)
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count) or current


def test_a_rank_takes_the_card_of_its_number_or_the_only_one_that_it_sees(cards):
    """SLURM binds a card to each task: local rank 1 sees one, cuda:0."""
    current = cards(4)
    assert join_world("auto").device == torch.device("cuda", 1) and current == [1]
    cards(1)
    assert join_world("auto").device == torch.device("cuda", 0) and current == [1, 0]


def test_more_ranks_than_gpus_is_refused(cards, monkeypatch):
    cards(2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"local rank 2 has no GPU of its own \(2 here\)"):
        join_world("auto")


@pytest.mark.parametrize("others", ["GPU-a", "GPU-b"])
def test_ranks_that_share_the_only_card_are_refused(monkeypatch, others):
    """Two ranks on a machine of one card see one each, as two that are bound to a card each do; the UUID tells them apart."""
    store = dist.HashStore()
    store.set("gpu/0", others)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-a"))
    place = World(1, 1, 2, torch.device("cuda", 0))
    if others == "GPU-b":
        world._refuse_shared_gpu(store, place)
    else:
        with pytest.raises(UserError, match="local rank 1 has no GPU of its own: ranks 0 and 1 share one; start fewer ranks"):
            world._refuse_shared_gpu(store, place)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a whole number"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, r"RANK=2 must be in 0\.\.1"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "without MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_an_incomplete_launch_names_the_variable(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        join_world("cpu")
