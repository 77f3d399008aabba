"""Going on and starting anew: what is passed over or moved aside is said, and nothing is lost."""

import json
import os
import shutil
from pathlib import Path

import pytest

from fastjepa import load_encoder
from fastjepa.checkpoint import directory
from fastjepa.checkpoint.directory import find_checkpoint
from fastjepa.cli.main import main
from fastjepa.errors import CheckpointError
from fastjepa.run.resume import start_directory
from tests.support.runs import lines, trained


@pytest.fixture(scope="module")
def run(toy_config, tmp_path_factory) -> Path:
    """A run with two checkpoints, of steps 2 and 4."""
    output = tmp_path_factory.mktemp("run")
    trained(toy_config, output, "--max-steps", 4, "logging.checkpoint_every=2", "data.num_workers=0", "logging.monitor_every=0")
    return output


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    directory._warn_once.cache_clear()
    return shutil.copytree(run, tmp_path / "run")


DAMAGES = {
    "manifest missing": (lambda path: (path / "manifest.json").unlink(), "its manifest.json is missing or unreadable"),
    "manifest cut": (lambda path: os.truncate(path / "manifest.json", 20), "its manifest.json is missing or unreadable"),
    "tensors missing": (lambda path: (path / "encoder.safetensors").unlink(), "its encoder.safetensors is missing"),
    "tensors cut": (lambda path: os.truncate(path / "optimizer.safetensors", 100), "its optimizer.safetensors has 100 of"),
    "tensors grown": (lambda path: _grow(path / "predictor.safetensors"), "its predictor.safetensors has"),
    "state missing": (lambda path: (path / "state.json").unlink(), "its state.json is missing"),
    "state empty": (lambda path: os.truncate(path / "state.json", 0), "its state.json has 0 of"),
}


def _grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


def resumed(config: Path, output: Path, *words: str) -> int:
    return main(["train", "--config", str(config), "--output", str(output), "--max-steps", "5", "data.num_workers=0",
                 "logging.monitor_every=0", *words])  # fmt: skip


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings about checkpoints."""
    return [record.getMessage() for record in caplog.records if record.name == directory.__name__]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_newer_checkpoint_that_lacks_something_is_named(copied, caplog, damage):
    spoil, lack = DAMAGES[damage]
    spoil(copied / "checkpoints/jepa-00000004")
    load_encoder(copied)
    find_checkpoint(copied / "checkpoints")
    (said,) = warned(caplog)
    assert said.startswith(f"{copied}/checkpoints/jepa-00000004: passed over, {lack}")
    assert said.endswith("jepa-00000002 is the newest complete checkpoint")


def test_a_run_says_that_it_goes_on_from_an_earlier_checkpoint(toy_config, copied, capsys, caplog):
    (copied / "checkpoints/jepa-00000004/optimizer.safetensors").unlink()
    assert resumed(toy_config, copied) == 0
    assert f"resuming from {copied}/checkpoints/jepa-00000002\n" in capsys.readouterr().out
    (said,) = warned(caplog)
    assert f"{copied}/checkpoints/jepa-00000004: passed over, its optimizer.safetensors is missing" in said
    assert [line["step"] for line in lines(copied)] == [1, 2, 3, 4, 5]


def test_an_older_checkpoint_that_is_damaged_is_no_matter(copied, caplog):
    (copied / "checkpoints/jepa-00000002/state.json").unlink()
    assert find_checkpoint(copied).name == "jepa-00000004" and not warned(caplog)


def test_where_all_are_damaged_each_command_names_one_and_its_lack(toy_config, copied, capsys):
    for path in (copied / "checkpoints").iterdir():
        (path / "encoder.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint \(jepa-00000004: its encoder.safetensors is miss"):
        load_encoder(copied)
    assert resumed(toy_config, copied) == 2
    assert "no other to resume from (its encoder.safetensors is missing)" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["never", "empty", "gone"])
def test_what_an_earlier_run_left_is_moved_aside_and_said(toy_config, copied, capsys, how):
    before = {name: (copied / name).read_bytes() for name in ("metrics.jsonl", "config.yaml", "run.json")}
    if how != "never":
        shutil.rmtree(copied / "checkpoints")
    if how == "empty":
        (copied / "checkpoints").mkdir()
    assert resumed(toy_config, copied, "runtime.seed=3", *(["--resume", "never"] if how == "never" else [])) == 0
    said = capsys.readouterr().out
    for name, content in before.items():
        stem, _, ending = name.partition(".")
        (kept,) = copied.glob(f"{stem}.until-*.{ending}")
        assert kept.read_bytes() == content and kept.name in said
    assert [line["step"] for line in lines(copied)] == [1, 2, 3, 4, 5]
    assert "seed: 3" in (copied / "config.yaml").read_text() and json.loads((copied / "run.json").read_text())
    if how == "never":
        assert len(list(copied.glob("checkpoints.until-*/jepa-*"))) == 2


def test_two_runs_of_one_second_are_both_kept(copied):
    for seed in (1, 2):
        moved = start_directory(copied, {"config": {"seed": seed}})
        (copied / "checkpoints").mkdir()
        assert set(moved) <= {path.name for path in copied.iterdir()}
    assert len(list(copied.glob("config.until-*.yaml"))) == len(list(copied.glob("checkpoints.until-*"))) == 2
