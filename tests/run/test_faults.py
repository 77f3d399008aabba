"""Breaks of runs, done to real ones of two sharded ranks by tests/support/faults.py: every time they come back exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMES = {"kill-mid-step": 2, "kill-in-save": 10, "stopped": 1, "data-hangs": 1, "disk-full": 1, "truncated": 1, "flipped": 1}
EVERY = 2  # steps between checkpoints there

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    """{fault: its row of the table}; one process tries them all, for it takes seconds to import what ranks need."""
    command = [sys.executable, "-m", "tests.support.faults", "--json", *(f"{fault}={times}" for fault, times in TIMES.items())]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700)
    assert done.stdout.startswith("["), done.stdout + done.stderr
    return {row["fault"]: row for row in json.loads(done.stdout)}


@pytest.mark.parametrize("fault", TIMES)
def test_a_run_comes_back_exactly(rows, fault):
    """Named and told in one sentence, nothing older damaged, and losses as if nothing had happened, to the last bit."""
    row = rows[fault]
    assert row["wrong"] == []
    assert (row["tried"], row["recovered"]) == (TIMES[fault], TIMES[fault])
    assert len(row["steps_lost"]) == TIMES[fault] and max(row["steps_lost"]) <= EVERY


def test_the_disk_that_filled_up_was_a_small_one_or_says_that_it_was_not(rows):
    """A tmpfs in a mount namespace of its own; where a container forbids that, a limit on the size of files stands in."""
    assert rows["disk-full"]["disk"] in ("tmpfs", "file size limit")


def test_a_fault_that_is_not_one_is_refused():
    done = subprocess.run([sys.executable, "-m", "tests.support.faults", "flood"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no such fault: flood; there are kill-mid-step, " in done.stderr
