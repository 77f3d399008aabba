"""Runs that learn from a frozen teacher, as a user starts them: SALT in two commands, and what a run keeps of its teacher."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastjepa import load_encoder
from fastjepa.cli.main import main
from fastjepa.evals.inputs import open_subject
from tests.support.places import ROOT
from tests.support.runs import losses, trained
from tests.support.teachers import write_teacher


@pytest.fixture(scope="module")
def salt(toy_config, tmp_path_factory) -> Path:
    """The two commands of configs/salt.yaml on 40 small images: the runs `teacher` and `student`."""
    place = tmp_path_factory.mktemp("salt")
    small = ["data.batch_size=8", f"data.source={toy_config.parent}", "meta.embed_dim=32", "meta.depth=2", "logging.every=1"]
    trained(ROOT / "configs/salt.yaml", place / "teacher", *small)
    trained(ROOT / "configs/salt.yaml", place / "student", *small, "loss.target=output", f"meta.teacher={place / 'teacher'}")
    return place


def again(salt: Path, *words: object) -> int:
    return main(["train", "--config", str(salt / "student/config.yaml"), "--output", str(salt / "student"), *map(str, words)])


def test_salt_is_two_commands(salt: Path):
    """The student predicts the teacher's target encoder, whose shape and hash the run records; its loss falls."""
    found = losses([json.loads(line) for line in (salt / "student/metrics.jsonl").read_text().splitlines()])
    assert len(found) == 10 and sum(found[-3:]) < 0.9 * sum(found[:3])
    record = json.loads((salt / "student/run.json").read_text())
    assert record["config"]["meta"]["teacher_shape"] == [32, 2, 2, 128, 4]
    assert len(record["teacher"]) == 64 and "teacher" not in json.loads((salt / "teacher/run.json").read_text())


def test_a_checkpoint_is_read_without_the_teachers_file(salt: Path, tmp_path: Path, capsys):
    """Loading, evaluating, converting; only going on needs the teacher, and says so."""
    student = shutil.copytree(salt / "student", tmp_path / "student")
    state = student / "checkpoints/jepa-00000010/state.json"
    assert str(salt / "teacher") in state.read_text()
    (student / "config.yaml").write_text((student / "config.yaml").read_text().replace(str(salt / "teacher"), "gone"))
    hidden = (salt / "teacher").rename(salt / "hidden")
    try:
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        features = load_encoder(student).forward_features(images)
        assert main(["convert", str(student), str(tmp_path / "kept"), "--to", "fastjepa"]) == 0
        assert torch.equal(load_encoder(tmp_path / "kept").forward_features(images), features)
        assert main(["convert", str(student), str(tmp_path / "all.pth.tar"), "--to", "meta"]) == 0
        for which in ("random", "context", "target"):
            assert open_subject(student).encoder(which).features(images).shape == (2, 64, 32)
        assert again(salt) == 2
        assert f"meta.teacher: {salt / 'teacher'} is not there; name a run" in capsys.readouterr().err
    finally:
        hidden.rename(salt / "teacher")


def test_a_run_goes_on_with_the_same_weights_wherever_they_lie_and_with_no_others(salt: Path, tmp_path: Path, capsys):
    before = json.loads((salt / "student/run.json").read_text())["teacher"]
    assert main(["convert", str(salt / "teacher"), str(tmp_path / "same"), "--to", "fastjepa"]) == 0
    assert again(salt, f"meta.teacher={tmp_path / 'same'}") == 0
    capsys.readouterr()
    other = write_teacher(tmp_path / "other", 4, grid=(8, 8), embed_dim=32, depth=2, num_heads=2, mlp_hidden=128)
    assert again(salt, f"meta.teacher={other}") == 2
    told = capsys.readouterr().err
    assert f"learned from the teacher of SHA-256 {before}, and now there is the teacher of SHA-256 " in told
    assert again(salt, "meta.teacher=", "meta.teacher_shape=null") == 2
    assert f"of SHA-256 {before}, and now there is no teacher; give the same weights" in capsys.readouterr().err


def test_a_run_does_not_learn_from_its_own_directory(salt: Path, capsys):
    for path in (salt / "student", salt / "student/checkpoints/jepa-00000010"):
        assert again(salt, f"meta.teacher={path}") == 2
        assert "the directory of this run, which it would learn to copy; give another --output" in capsys.readouterr().err
