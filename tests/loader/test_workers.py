"""Worker processes that are killed, stopped or short of memory or descriptors: one sentence each, and no wait without end."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data._utils import worker as torch_worker

from fastjepa.data.decode_dali import Encoded, View
from fastjepa.data.sources import open_source
from fastjepa.errors import LoaderError, UserError
from fastjepa.loader.loader import Loader, batch_recipe
from fastjepa.loader.micro_batches import MicroBatches
from fastjepa.loader.shared import share
from fastjepa.loader.workers import Crew, Workers, seconds_waited
from fastjepa.ranks.world import World
from tests.support.batches import CPU, settings
from tests.support.images import save_image


class Numbers(Dataset):
    """Item i is 13 tensors of i; `odd` is done in the process that makes item 5."""

    def __init__(self, odd=lambda: None):
        self.odd = odd

    def __getitem__(self, i: int) -> list[Tensor]:
        if i == 5:
            self.odd()
        return [torch.full((1000,), i) for _ in range(13)]


def read_all(workers: Workers) -> list[int]:
    try:
        return [int(item[12][999]) for item in workers]
    finally:
        workers.close()


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_items_come_in_order_and_are_over_once(processes: int):
    workers = Workers(Numbers(), range(2, 9), Crew(processes))
    assert read_all(workers) == [2, 3, 4, 5, 6, 7, 8]
    assert next(workers, None) is None and seconds_waited() == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(8):
        save_image(tmp_path / f"{i}.png", seed=i)
    return tmp_path


def test_a_micro_batch_in_shared_memory_is_the_same_to_the_last_bit(folder: Path):
    batch = MicroBatches(batch_recipe(settings(folder)), open_source(folder), 0, 1)[0]
    sent = share(batch).opened()
    assert (sent.bad, sent.context.max_len, sent.context.length) == (batch.bad, batch.context.max_len, batch.context.length)
    for ours, theirs in zip(sent.tensors(), batch.tensors(), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32])
def test_tensors_of_any_kind_travel(shape: tuple[int, ...], dtype: torch.dtype):
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(shape, dtype=dtype), "c": torch.arange(6).view(2, 3).T}
    sent = share(tensors).opened()
    assert all(torch.equal(sent[name], tensor) and sent[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_encoded_files_travel_as_one_piece():
    encoded = Encoded.of([View(b"abc", (0, 0, 1, 2), False), View(b"de", (1, 2, 3, 4), True)])
    sent = share(encoded).opened()
    assert bytes(sent.files) == b"abcde" and sent.ends.tolist() == [3, 5] and sent.flips.tolist() == [0, 1]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_an_item_holds_one_descriptor_however_many_tensors_it_has():
    workers = Workers(Numbers(), range(20), Crew(1))
    kept, before = [next(workers)], open_descriptors()
    kept += [next(workers) for _ in range(10)]
    held = open_descriptors() - before
    workers.close()
    assert held <= 12, f"10 items hold {held} descriptors"


@pytest.mark.parametrize("moment", ["while it makes an item", "between two items"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_process_is_named(moment: str, number: signal.Signals):
    during = moment == "while it makes an item"
    workers = Workers(Numbers((lambda: os.kill(os.getpid(), number)) if during else (lambda: None)), range(100), Crew(2))
    next(workers)
    if not during:
        os.kill(workers.processes[0].pid, number)
    began = time.monotonic()
    with pytest.raises(LoaderError, match=rf"^loader process \d+ was killed by {number.name}.*; give it more memory or close"):
        read_all(workers)
    assert time.monotonic() - began < 20
    assert not any(process.is_alive() for process in workers.processes)


def test_a_process_that_ends_by_itself_is_named():
    with pytest.raises(LoaderError, match="has ended with exit code 7"):
        read_all(Workers(Numbers(lambda: os._exit(7)), range(9), Crew(1)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_that_comes_while_a_process_starts_is_ignored(monkeypatch, when: str, number: signal.Signals):
    """`when`: before or after torch has set its own handler of SIGTERM, which ends the process with code 0."""
    place, name = {"before": (torch_worker, "_worker_loop"), "after": (torch, "manual_seed")}[when]
    original, parent = getattr(place, name), os.getpid()

    def slow(*given):
        if os.getpid() != parent:
            time.sleep(0.5)
        return original(*given)

    monkeypatch.setattr(place, name, slow)
    workers = Workers(Numbers(), range(9), Crew(2))
    for process in workers.processes:
        time.sleep(0.05)
        os.kill(process.pid, number)
    assert read_all(workers) == list(range(9))


@pytest.mark.parametrize("how", ["stopped", "hanging"])
def test_processes_that_deliver_nothing_are_given_up(how: str):
    workers = Workers(
        Numbers((lambda: time.sleep(60)) if how == "hanging" else (lambda: None)),
        range(100),
        Crew(2, timeout=1, key="runtime.timeout"),
    )
    assert int(next(workers)[0][0]) == 0
    if how == "stopped":
        for process in workers.processes:
            os.kill(process.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(LoaderError, match=r"delivered nothing for 1 s \(runtime.timeout\).*/dev/shm .* MiB free; docker run"):
        read_all(workers)
    assert time.monotonic() - began < 20


@pytest.fixture
def pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is pinned without a GPU: torch's thread for it runs, and copies."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_thread_that_pins_ends_with_the_processes(pinning, capfd, number: signal.Signals):
    assert read_all(Workers(Numbers(), range(9), Crew(2, pinned=True))) == list(range(9))
    workers = Workers(Numbers(), range(200), Crew(1, pinned=True, timeout=3))
    thread = workers._pinning
    next(workers)
    os.kill(workers.processes[0].pid, number)
    with pytest.raises(LoaderError, match="was killed by SIGKILL|has delivered nothing for 3 s"):
        read_all(workers)
    assert not thread.is_alive() and "Traceback" not in capfd.readouterr().err


def test_a_mistake_in_a_process_arrives_as_its_sentence():
    def mistake() -> None:
        raise UserError("data.source: is empty")

    with pytest.raises(UserError) as caught:
        read_all(Workers(Numbers(mistake), range(9), Crew(1)))
    assert str(caught.value) == "data.source: is empty"


def out_of_files(*where: object) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), *where)


def test_too_many_open_files_in_a_process_are_said():
    crew = Crew(1, remedy="lower data.num_workers (1) or data.prefetch (2)")
    with pytest.raises(LoaderError, match=r"^too many open files \(ulimit -n is \d+\): .*ulimit -n 4096, or lower data.num_w"):
        read_all(Workers(Numbers(out_of_files), range(9), crew))


LIMITED = """
import resource, sys
from fastjepa.errors import LoaderError
from fastjepa.loader.workers import Crew, Workers
from tests.loader.test_workers import Numbers, open_descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + {room}, 4096))
try:
    workers = Workers(Numbers(), range(200), Crew(4))
    kept = list(workers)
    print("all")
except LoaderError as error:
    print(error)
"""


def python(code: str, *before: str) -> str:
    """Return what a program printed, which is to end well and without a traceback."""
    ended = subprocess.run([*before, sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    return ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize("room", [2, 8, 16, 24, 40])
def test_whatever_the_limit_of_files_the_end_is_a_sentence(room: int):
    """At the start, and in both ends of the way between the processes."""
    assert "too many open files (ulimit -n is" in python(LIMITED.format(room=room))


SMALL = """
import torch
from fastjepa.errors import LoaderError
from fastjepa.loader.workers import Crew, Workers
class Large(torch.utils.data.Dataset):
    def __getitem__(self, i):
        return torch.zeros(3 << 20, dtype=torch.uint8)
try:
    print(len([int(item[0]) for item in Workers(Large(), range(20), Crew({processes}, remedy="lower data.num_workers"))]))
except LoaderError as error:
    print(error)
"""
SMALL_SHM = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$@"', "sh")


@pytest.mark.slow
def test_a_full_shm_is_said_with_the_size_that_would_do():
    said = python(SMALL.format(processes=4), *SMALL_SHM)
    assert "/dev/shm is full: " in said and "of 8 MiB free, and 4 loader processes ask for up to 30 MiB" in said
    assert "--shm-size=30m" in said and "lower data.num_workers" in said
    assert python(SMALL.format(processes=0), *SMALL_SHM) == "20\n"


def test_a_file_that_could_not_be_opened_for_want_of_descriptors_is_not_bad(folder: Path, monkeypatch):
    source = open_source(folder)
    monkeypatch.setattr(type(source), "read", lambda self, i: out_of_files(self.name(i)))
    with Loader(settings(source=folder), source, World(0, 0, 1, CPU), 0) as loader:
        with pytest.raises(OSError, match="Too many open files"):
            list(loader.micro_batches(0))
        assert not loader.bad
