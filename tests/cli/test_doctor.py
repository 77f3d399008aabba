"""`fastjepa doctor`: one screen that says what runs here, what does not, why, and what to install."""

import json
import re
import sys

import pytest
import torch

from fastjepa.cli import survey
from fastjepa.cli.main import main
from fastjepa.cli.survey import DEEPSPEED_OPS, OPTIONAL_PACKAGES, deepspeed_op_rows, driver_row, precision_row, survey_machine
from fastjepa.config.load import config_from_dict, load_config
from fastjepa.data.sources import open_source
from fastjepa.engine.precision import settle_dtype
from fastjepa.loader.loader import batch_bytes, batch_recipe, crew_of
from fastjepa.loader.micro_batches import MicroBatches
from tests.support.places import ROOT

CPU = torch.device("cpu")


def asked_for(**data: object) -> tuple:
    """The crew of a run, and the bytes of its micro-batches."""
    config = config_from_dict({"data": data})
    return crew_of(config, CPU), batch_bytes(config)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, tuple[str, str]]]:
    return {topic: {what: (state, why) for what, state, why in rows} for topic, rows in survey_machine(*asked_for()).items()}


def test_it_covers_the_machine(found):
    assert found.keys() == {
        "versions",
        "decoder",
        "shared memory",
        "precision",
        "attention",
        "kernels",
        "DeepSpeed ops",
        "packages",
    }
    assert {"fastjepa", "fastjepa-kernels", "torch", "triton", "GPU", "driver"} == found["versions"].keys()
    assert found["versions"]["torch"][0] == torch.__version__


def test_the_dtype_of_auto_is_the_trainers(found, monkeypatch):
    settled = settle_dtype("auto", CPU)
    assert found["precision"]["auto"][0] == settled
    monkeypatch.setattr(survey, "has_bf16", lambda device: False)
    assert precision_row(CPU) == ("auto", "fp32", "this CPU has no bf16 instructions")


def test_what_cannot_run_says_why(found):
    for topic in ("attention", "DeepSpeed ops", "packages"):
        assert all(why for state, why in found[topic].values() if state == "no"), topic


def test_every_extra_that_a_command_asks_for_is_named(found):
    extras = set(re.findall(r'^    "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE))
    named = {why.partition("fastjepa[")[2].partition("]")[0] for _, why in OPTIONAL_PACKAGES.values()}
    assert named <= extras
    assert named >= {"dali", "deepspeed", "lightly", "eval", "pyarrow", "onnx", "remote"}


def test_deepspeeds_parts_are_asked_of_deepspeed(found, monkeypatch):
    assert found["DeepSpeed ops"].keys() == DEEPSPEED_OPS.keys()
    assert found["DeepSpeed ops"]["cpu_adam"][1].endswith("torch's AdamW as well")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert {state for _, state, _ in deepspeed_op_rows(CPU)} == {"no"}
    assert "pip install 'fastjepa[deepspeed]'" in deepspeed_op_rows(CPU)[0][2]


@pytest.mark.parametrize(
    ("script", "state", "why"),
    [
        ("echo 580.65.06", "580.65.06", "torch reaches no GPU through it"),
        ("echo could not talk to the driver >&2; exit 9", "no", "could not talk to the driver"),
    ],
)
def test_the_driver_is_asked_for_its_version(script, state, why, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    said = driver_row(CPU)
    assert said[0] == state and why in said[1]
    monkeypatch.setenv("PATH", "/no/such/folder")
    assert driver_row(CPU)[0] == "none"


def test_the_screen_and_the_json_are_the_same(found, capsys):
    assert main(["doctor", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {topic: [row[0] for row in rows[topic]] for topic in rows} == {topic: list(found[topic]) for topic in found}
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(what in shown for topic in found.values() for what in topic)


@pytest.mark.parametrize(("total", "free", "state"), [(64, 64, "too small"), (4096, 100, "too small"), (4096, 4000, "enough")])
def test_shared_memory_is_compared_with_what_a_config_asks_for(total, free, state, monkeypatch):
    monkeypatch.setattr(survey, "free_and_total", lambda: (free << 20, total << 20))
    said = survey.shared_memory_row(*asked_for(), ranks=1)
    assert said[:2] == ("/dev/shm", state) and f"of {total} MiB, {free} free" in said[2]
    assert ("--shm-size" in said[2]) == (state == "too small")
    assert "144 micro-batches" in survey.shared_memory_row(*asked_for(num_workers=71), ranks=1)[2]
    assert survey.shared_memory_row(*asked_for(num_workers=0), ranks=8)[1] == "enough"


def test_the_size_asked_for_is_that_of_a_real_micro_batch(toy_config):
    config = load_config(toy_config)
    batch = MicroBatches(batch_recipe(config), open_source(config.data.address), 0, 1)[0]
    assert batch_bytes(config) == sum(tensor.nbytes for tensor in batch.tensors())


def test_overrides_of_no_config_are_refused(capsys):
    assert main(["doctor", "data.num_workers=2"]) == 2
    assert "of which config?" in capsys.readouterr().err
