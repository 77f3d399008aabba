"""The encoder in ONNX and as a torch.export program: the features of the packed path, at one size and at any."""

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from transformers import IJepaConfig, IJepaModel

from fastjepa import load_encoder
from fastjepa.checkpoint.save import save_checkpoint
from fastjepa.cli.main import main
from fastjepa.config.load import config_from_dict
from fastjepa.model.positions import POSITIONS
from fastjepa.weights.export import WholeImages
from fastjepa.weights.pretrained import PretrainedEncoder, encoder_of_weights
from fastjepa.weights.read import read_weights
from tests.support.weights import IJEPA, SHAPE, convert, make_state

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run")
    save_checkpoint(path / "checkpoints", make_state(config_from_dict(SHAPE)))
    return path


@pytest.fixture(scope="module")
def encoder(run) -> PretrainedEncoder:
    return load_encoder(run)


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["fixed", "dynamic"])
def dynamic(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def session(run, dynamic, tmp_path_factory) -> onnxruntime.InferenceSession:
    path = tmp_path_factory.mktemp("onnx") / "encoder.onnx"
    convert(run, path, "--to", "onnx", *["--dynamic"] * dynamic)
    onnx.checker.check_model(path, full_check=True)
    return onnxruntime.InferenceSession(path)


def error(found, expected: torch.Tensor) -> float:
    return (torch.as_tensor(found) - expected).abs().max().item()


def test_the_plain_path_is_the_packed_one_on_the_same_weights(encoder, dynamic):
    plain = WholeImages(encoder, dynamic)
    assert {p.data_ptr() for p in plain.parameters()} == {p.data_ptr() for p in encoder.parameters()}
    images = torch.randn(3, 3, 32, 48)
    assert error(plain(images), encoder.forward_features(images)) < TOLERANCE


def test_positions_are_those_of_the_trainer_at_any_grid(encoder):
    plain = WholeImages(encoder, dynamic=True)
    for grid in ((4, 6), (1, 1), (28, 32)):
        assert error(plain.positions(*grid), encoder.positions(grid)) < TOLERANCE


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("positions", POSITIONS)
def test_each_kind_of_positions_is_that_of_the_trainer(run, positions, antialias):
    loaded = read_weights(run)
    encoder = encoder_of_weights(loaded.form, loaded.tensors, positions, antialias)
    plain = WholeImages(encoder, dynamic=True)
    for grid in ((4, 6), (2, 3), (8, 12), (7, 5)):
        assert error(plain.positions(*grid), encoder.positions(grid)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["scaled", "interpolated"])
@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_a_program_of_any_size_has_the_positions_that_were_asked_for(run, tmp_path, to, positions):
    convert(run, tmp_path / f"encoder.{to}", "--to", to, "--dynamic", "--positions", positions)
    if to == "onnx":
        session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    else:
        program = torch.export.load(tmp_path / "encoder.pt2").module()
    encoder = load_encoder(run, positions=positions)
    for batch, height, width in SIZES[True]:
        images = torch.randn(batch, 3, height, width)
        found = session.run(["features"], {"images": images.numpy()})[0] if to == "onnx" else program(images)
        assert error(found, encoder.forward_features(images)) < TOLERANCE


SIZES = {False: [(1, 32, 48), (5, 32, 48)], True: [(2, 32, 48), (1, 16, 16), (3, 64, 40), (1, 96, 96)]}


@pytest.mark.slow
def test_onnxruntime_gives_the_same_features(encoder, session, dynamic):
    for batch, height, width in SIZES[dynamic]:
        images = torch.randn(batch, 3, height, width)
        (found,) = session.run(["features"], {"images": images.numpy()})
        assert error(found, encoder.forward_features(images)) < TOLERANCE
    said = json.loads(session.get_modelmeta().custom_metadata_map["fastjepa"])
    assert said == encoder.form.to_dict()
    if not dynamic:
        with pytest.raises(Exception, match="Expected: 48"):
            session.run(None, {"images": torch.zeros(1, 3, 32, 32).numpy()})


def test_a_torch_program_gives_the_same_features(run, encoder, tmp_path, dynamic):
    convert(run, tmp_path / "encoder.pt2", "--to", "pt2", *["--dynamic"] * dynamic)
    said = {"fastjepa": ""}
    loaded = torch.export.load(tmp_path / "encoder.pt2", extra_files=said).module()
    for batch, height, width in SIZES[dynamic]:
        images = torch.randn(batch, 3, height, width)
        assert error(loaded(images), encoder.forward_features(images)) < TOLERANCE
    assert json.loads(said["fastjepa"])["which"] == "target"


def test_learned_positions_fit_one_size_alone(tmp_path, capsys):
    IJepaModel(IJepaConfig(**IJEPA, image_size=32)).save_pretrained(tmp_path / "hf")
    command = ["convert", str(tmp_path / "hf"), str(tmp_path / "encoder.onnx"), "--to", "onnx"]
    assert main([*command, "--dynamic"]) == 2
    assert "positions were learned for one size" in capsys.readouterr().err
    assert not (tmp_path / "encoder.onnx").exists()
    ours = load_encoder(tmp_path / "hf")  # with its eps of 1e-12
    images = torch.randn(2, 3, 32, 32)
    assert error(WholeImages(ours)(images), ours.forward_features(images)) < TOLERANCE
