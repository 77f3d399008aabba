"""Golden values: what the trainer computes, writes and offers, against the values in `tests/reference/`, which an earlier
commit gave.

`tests/reference/record_golden.py` runs the trainer and writes what it sees; this file compares. Three kinds of value:

- Equal on every machine: masks, crops, pixels of micro-batches, names of a checkpoint's files, tensors and keys, options.
- Within 1e-6 of their size on every machine: losses and schedules; within 1e-5 regularizers, and features of kept weights.
  Other instructions (SSE, AVX-512) moved losses by 3e-7 at most and regularizers by 1.4e-6.
- Final weights: equal to the last bit (SHA-256) where torch's version and the CPU's maker and family are those of the
  recording; on every machine norm, mean size and greatest size of each network agree within 1e-5.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REFERENCE = Path(__file__).resolve().parent / "reference"
GOLDEN = json.loads((REFERENCE / "golden.json").read_text())
HELP = json.loads((REFERENCE / "help.json").read_text())
KEPT = sorted(GOLDEN["kept"])

pytestmark = pytest.mark.xdist_group("golden")  # one recording serves all


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    """Observations of the present code."""
    out = tmp_path_factory.mktemp("golden") / "seen.json"
    recorder = [sys.executable, str(REFERENCE / "record_golden.py"), "observe", str(out)]
    done = subprocess.run(recorder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def options(text: str) -> set[str]:
    """Return the options in the usage of a --help, and the words one may choose from."""
    usage = text.partition("\n\n")[0]
    choices = {word for group in re.findall(r"\{([^{}]*)\}", usage) for word in group.split(",")}
    return choices | set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", usage))


def close(expected: object, rel: float, at_least: float = 0.0):
    return pytest.approx(expected, rel=rel, abs=at_least)


@pytest.mark.parametrize("run", GOLDEN["runs"])
def test_losses_of_twenty_steps(seen, run: str):
    found, expected = seen["runs"][run], GOLDEN["runs"][run]
    assert found.keys() == expected.keys() and len(found["loss"]) == 20
    for name, tolerance in (("loss", 1e-6), ("regularizer", 1e-5)):
        assert found.get(name, []) == close(expected.get(name, []), tolerance), name


@pytest.mark.parametrize("run", GOLDEN["runs"])
def test_final_weights(seen, run: str):
    found, expected = seen["runs"][run], GOLDEN["runs"][run]
    if seen["made_by"] == GOLDEN["made_by"]:
        assert found["sha256"] == expected["sha256"]
    for network, numbers in expected["statistics"].items():
        assert found["statistics"][network] == close(numbers, 1e-5), network


def test_every_recorded_run_is_run_and_no_other(seen):
    for part in ("runs", "kept", "masks"):
        assert seen[part].keys() == GOLDEN[part].keys()


def test_schedules(seen):
    for name, values in GOLDEN["schedule"].items():
        assert seen["schedule"][name] == close(values, 1e-6), name


@pytest.mark.parametrize("draw", GOLDEN["masks"])
def test_masks_of_a_seed_step_and_slot(seen, draw: str):
    assert seen["masks"][draw] == GOLDEN["masks"][draw]


@pytest.mark.parametrize("part", ["boxes", "pixels"])
def test_crops_of_a_seed_epoch_and_sample(seen, part: str):
    assert seen["crops"][part] == GOLDEN["crops"][part]


@pytest.mark.parametrize("kind", ["checkpoint", "sharded_checkpoint"])
def test_names_in_a_checkpoint(seen, kind: str):
    assert seen[kind] == GOLDEN[kind]


@pytest.mark.parametrize("run", KEPT)
def test_an_earlier_checkpoint_gives_its_encoders(seen, run: str):
    for which in ("target", "context"):
        assert seen["kept"][run][which] == close(GOLDEN["kept"][run][which], 1e-5, at_least=1e-5), which


@pytest.mark.parametrize("run", KEPT)
def test_an_earlier_checkpoint_is_resumed(seen, run: str):
    for name, tolerance in (("step", 0), ("loss", 1e-6), ("regularizer", 1e-5)):
        assert seen["kept"][run]["resumed"][name] == close(GOLDEN["kept"][run]["resumed"][name], tolerance), name


@pytest.mark.parametrize("run", [run for run in KEPT if "marked" in GOLDEN["kept"][run]])
def test_an_earlier_cache_of_features_is_read_and_none_is_made_beside_it(seen, run: str):
    found = seen["kept"][run]
    assert found["computed"] == close(GOLDEN["kept"][run]["computed"], 0.03)  # one of 40 images
    assert found["computed"] < 1 and found["marked"] == 1, "the cached features, which were labels, were not used"
    assert found["files_written"] == []


@pytest.mark.parametrize("command", HELP)
def test_every_option_is_still_there(seen, command: str):
    assert options(HELP[command]) <= options(seen["help"].get(command, ""))
