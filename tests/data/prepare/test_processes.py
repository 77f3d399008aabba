"""Work in processes that die or stand still: a sentence, and no wait without end."""

import os
import signal
import time

import pytest

from fastjepa.data.prepare import processes
from fastjepa.data.prepare.processes import map_in_processes


def act(job: str, item: int) -> int:
    """Return the item, or do what the job says when it is 3."""
    if item == 3 and job == "sleep":
        time.sleep(60)
    if item == 3 and job == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if item == 3 and job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 3 and job == "work":
        until = time.process_time() + 1.5
        while time.process_time() < until:
            pass
    if item == 3 and job == "fail":
        raise TimeoutError("the server is silent")
    return item


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers: int):
    assert list(map_in_processes(act, "", range(8), workers)) == list(range(8))
    assert list(map_in_processes(act, "", [], workers)) == []


@pytest.mark.parametrize("how", ["sleep", "stop"])
def test_processes_that_stand_still_are_ended(monkeypatch, how: str):
    monkeypatch.setattr(processes, "STALL", 1.0)
    began = time.monotonic()
    with pytest.raises(OSError, match="the worker processes have done nothing for 1 s; look at the storage"):
        list(map_in_processes(act, how, range(8), 2))
    assert time.monotonic() - began < 20


def test_a_process_that_works_for_longer_is_left_alone(monkeypatch):
    monkeypatch.setattr(processes, "STALL", 1.2)
    monkeypatch.setattr(processes, "POLL", 0.3)
    assert list(map_in_processes(act, "work", range(5), 1)) == list(range(5))


def test_a_killed_process_and_an_error_are_told():
    with pytest.raises(OSError, match="a worker process was killed"):
        list(map_in_processes(act, "die", range(8), 2))
    with pytest.raises(TimeoutError, match="the server is silent"):
        list(map_in_processes(act, "fail", range(8), 2))
