"""Parity with the reference trajectories, and that parity can fail."""

import shutil
from pathlib import Path

import pytest
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from fastjepa.cli.main import main
from fastjepa.engine import schedule
from fastjepa.engine.average import Average
from fastjepa.run.verify import errors_pass, verify_file

FILES = sorted((Path(__file__).parent / "reference").glob("*.safetensors"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_trainer_follows_the_reference(file):
    errors = verify_file(file)
    assert set(errors) == {
        "target_features", "context_features", "predictions", "targets", "loss", "gradients",
        "schedule", "losses", "final_weights", "varlen_loss", "varlen_gradients",
    }  # fmt: skip
    assert errors_pass(errors), errors


def changed(file: Path, to: Path, name: str) -> Path:
    with safe_open(file, "pt") as source:
        tensors, metadata = {key: source.get_tensor(key) for key in source.keys()}, source.metadata()  # noqa: SIM118
    tensors[name] = tensors[name] + 1e-4 * tensors[name].abs().max()
    save_file(tensors, to, metadata)
    return to


@pytest.mark.parametrize(
    ("tensor", "quantity"),
    [
        ("step0.target_features", "target_features"),
        ("step0.predictions", "predictions"),
        ("step0.grad.encoder.blocks.0.attn.qkv.weight", "gradients"),
        ("losses", "losses"),
        ("lr_wd_momentum", "schedule"),
        ("varlen.grad.predictor.mask_token", "varlen_gradients"),
    ],
)
def test_a_difference_is_found_where_it_is(tmp_path, tensor, quantity):
    errors = verify_file(changed(FILES[0], tmp_path / "changed.safetensors", tensor))
    assert not errors_pass(errors)
    assert errors[quantity] > 5e-5


@pytest.mark.parametrize(
    ("module", "name", "fault", "quantity"),
    [
        (schedule, "cosine_between", lambda start, end, progress: start, "schedule"),
        (Average, "update", lambda *args: None, "final_weights"),
        (F, "smooth_l1_loss", F.l1_loss, "loss"),
    ],
)
def test_a_fault_in_the_trainer_is_found(monkeypatch, module, name, fault, quantity):
    monkeypatch.setattr(module, name, fault)
    errors = verify_file(FILES[0])
    assert not errors_pass(errors)
    assert errors[quantity] > 1e-5


def test_the_command_exits_with_1_on_a_difference_and_2_on_another_file(tmp_path, capsys):
    wrong = changed(FILES[0], tmp_path / "wrong.safetensors", "losses")
    assert main(["verify", str(FILES[1]), str(wrong), "--json"]) == 1
    assert '"ok": true' in capsys.readouterr().out
    shutil.copy(__file__, tmp_path / "text.safetensors")
    assert main(["verify", str(tmp_path / "text.safetensors")]) == 2
    assert "not a reference file" in capsys.readouterr().err


def test_nan_never_passes():
    assert not errors_pass({"loss": float("nan")})
