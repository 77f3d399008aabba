"""Encoders with rotary positions or normalised queries and keys: read, exported, and refused where a format lacks them."""

from pathlib import Path

import pytest
import timm
import torch

from fastjepa import load_encoder
from fastjepa.checkpoint.directory import find_checkpoint
from fastjepa.checkpoint.save import save_checkpoint
from fastjepa.cli.main import main
from fastjepa.config.load import config_from_dict
from fastjepa.errors import UserError
from fastjepa.evals.inputs import open_subject, read_config
from tests.support.weights import SHAPE, convert, make_state

FORMS = {"rope": {"positions": "rope"}, "qk_norm": {"qk_norm": True}, "both": {"positions": "rope", "qk_norm": True}}


@pytest.fixture(scope="module", params=FORMS)
def run(request, tmp_path_factory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("run")
    meta = SHAPE["meta"] | {"pred_num_heads": 1} | FORMS[request.param]
    save_checkpoint(path / "checkpoints", make_state(config_from_dict(SHAPE | {"meta": meta})))
    return request.param, path


def features(encoder, size: tuple[int, int]) -> torch.Tensor:
    return encoder.forward_features(torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)))


def test_a_folder_of_ours_has_its_features_at_any_size(run, tmp_path):
    form, path = run
    encoder = load_encoder(path)
    convert(path, tmp_path / "folder", "--to", "fastjepa")
    read = load_encoder(tmp_path / "folder")
    assert (read.form.rotary, read.form.qk_norm) == ("positions" in FORMS[form], "qk_norm" in FORMS[form])
    for size in (encoder.image_size, (16, 24)):
        assert torch.equal(features(read, size), features(encoder, size))
    meta = read_config(tmp_path / "folder").meta
    assert (meta.positions == "rope", meta.qk_norm) == (read.form.rotary, read.form.qk_norm)


@pytest.mark.parametrize("which", ["target", "context", "random"])
def test_evaluations_read_it_at_any_size(run, which):
    """All of them open the encoder in this way."""
    form, path = run
    for size in (None, 2 * SHAPE["data"]["crop_size"][0]):
        subject = open_subject(path, "cpu", cache=False, image_size=size)
        assert subject.encoder(which).features(torch.randn(2, 3, *subject.size)).isfinite().all()
        assert (subject.positions is None) == ("positions" in FORMS[form])


def test_a_program_of_torch_has_its_features_at_any_size(run, tmp_path):
    encoder = load_encoder(run[1])
    convert(run[1], tmp_path / "encoder.pt2", "--to", "pt2", "--dynamic")
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    for size in (encoder.image_size, (16, 40)):
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(program(images), encoder.forward_features(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", ["timm", "transformers", "meta"])
def test_a_format_that_lacks_it_is_refused_and_nothing_is_written(run, to, tmp_path, capsys):
    form, path = run
    if (form, to) == ("qk_norm", "timm"):
        return check_in_timm(path, tmp_path / "out")
    for which in [[], ["--which", "target"]] if to == "meta" else [[]]:
        assert main(["convert", str(path), str(tmp_path / "out"), "--to", to, *which]) == 2
        said = capsys.readouterr().err
        assert "use --to fastjepa" in said and said.count("\n") == 1 and not (tmp_path / "out").exists()
    return None


def check_in_timm(path: Path, folder: Path) -> None:
    """timm's ViT knows qk_norm, and gives the same features."""
    convert(path, folder, "--to", "timm")
    vit, encoder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), load_encoder(path)
    images = torch.randn(2, 3, *encoder.image_size)
    torch.testing.assert_close(vit.forward_features(images), encoder.forward_features(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features(load_encoder(folder), encoder.image_size), features(encoder, encoder.image_size))


def test_rotary_positions_are_not_chosen_and_not_guessed(run, tmp_path):
    form, path = run
    if form == "qk_norm":
        assert load_encoder(path, positions="scaled").other_positions == "scaled"
        return
    with pytest.raises(UserError, match="rotary positions follow any size by themselves; leave --positions out"):
        open_subject(run[1], "cpu", image_size=2 * SHAPE["data"]["crop_size"][0], positions="scaled")
    with pytest.raises(UserError, match="rotary positions follow any size by themselves"):
        load_encoder(path, positions="scaled")
    with pytest.raises(
        UserError, match="pos_embed.*is not there; one with rotary positions needs its run directory or --config"
    ):
        load_encoder(find_checkpoint(path) / "target_encoder.safetensors")
