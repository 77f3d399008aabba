"""Encoders of any number of channels: adapted from three as timm does, and the same through every format."""

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from timm.models._manipulate import adapt_input_conv
from transformers import IJepaModel

from fastjepa.cli.main import main
from fastjepa.config.load import config_from_dict
from fastjepa.data.pixels import normalise_pixels
from fastjepa.errors import ConfigError, UserError
from fastjepa.evals.inputs import read_config
from fastjepa.loader.loader import pixels_of
from fastjepa.model.jepa import build_pair
from fastjepa.run.resume import load_initial_weights
from fastjepa.weights.hub_folders import timm_arguments
from fastjepa.weights.input_channels import adapted_embedding
from fastjepa.weights.read import load_encoder, read_weights
from tests.support.arrays import measured
from tests.support.evals import ARRAYS, SMALL, write_array_run, write_run
from tests.support.weights import convert

KINDS = ["float32 bands", "uint16 bands", pytest.param("uint16 grey", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_array_run(tmp_path_factory.mktemp("arrays"), request.param)


def shaped(**data) -> dict:
    return SMALL | {"data": {"crop_size": 16} | data}


MANY = ARRAYS["float32 bands"]


@pytest.fixture(scope="module")
def rgb(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("rgb"), shape=shaped())


def parts_of(shape: dict) -> dict[str, torch.nn.Module]:
    jepa, target = build_pair(config_from_dict(shape))
    return {"encoder": jepa.encoder, "predictor": jepa.predictor, "target_encoder": target}


@pytest.mark.parametrize("channels", [1, 2, 4, 12, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rule_is_timms(channels, dtype):
    weight = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, theirs = adapted_embedding(weight, channels), adapt_input_conv(channels, weight)
    assert found.dtype == dtype and found.shape == (8, channels, 4, 4)
    torch.testing.assert_close(found, theirs, rtol=2e-7 if dtype == torch.float32 else 1e-2, atol=0)


@pytest.mark.parametrize("data", [MANY, {"channels": 1}], ids=["12 bands", "grey"])
def test_a_run_starts_from_three_channels(rgb, data):
    parts = parts_of(shaped(**data))
    names, notes = load_initial_weights(parts, rgb)
    channels = data["channels"]
    assert names == ["encoder", "predictor", "target_encoder"] and len(notes) == 1
    assert ("summed over the 3, as timm does" if channels == 1 else "repeated for 12 and scaled by 3/12, as timm") in notes[0]
    for name, which in (("encoder", "context"), ("target_encoder", "target")):
        given, own = load_encoder(rgb, which).state_dict(), parts[name].state_dict()
        assert own["blocks.0.attn.qkv.weight"].equal(given["blocks.0.attn.qkv.weight"])
        expected = adapt_input_conv(channels, given["patch_embed.proj.weight"])
        torch.testing.assert_close(own["patch_embed.proj.weight"], expected, rtol=2e-7, atol=0)


def test_a_grey_image_gives_what_it_gave_in_colour(rgb):
    parts, image = parts_of(shaped(channels=1)), torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    load_initial_weights(parts, rgb)
    expected = load_encoder(rgb, "context").features(image.expand(-1, 3, -1, -1))
    torch.testing.assert_close(parts["encoder"].features(image), expected, rtol=1e-3, atol=1e-4)


def test_as_many_channels_are_left_as_they_are_and_others_refused(run):
    shape = read_config(run).to_dict()
    parts = parts_of(shape)
    assert load_initial_weights(parts, run)[1] == []
    held = load_encoder(run, "context").state_dict()["patch_embed.proj.weight"]
    assert parts["encoder"].patch_embed.proj.weight.equal(held)
    with pytest.raises(ConfigError, match=rf"{held.shape[1]} channels, and data.channels is 5; only one of 3 is adapted"):
        load_initial_weights(parts_of(shaped(channels=5, mean=[0.5] * 5, std=[0.5] * 5)), run)


@pytest.mark.slow
def test_the_command_says_how_the_embedding_was_adapted(rgb, tmp_path, capsys):
    made = write_array_run(tmp_path, "float32 bands")
    words = ["train", "--config", str(made / "config.yaml"), "--output", str(tmp_path / "new"), "--init", str(rgb)]
    assert main([*words, "--max-steps", "1", "runtime.device=cpu", "runtime.dtype=fp32", "logging.monitor_every=0"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "patch embedding is of 3 channels and data.channels is 12: its weights are repeated for 12" in said


@pytest.mark.parametrize("to", ["fastjepa", "timm", "transformers", "meta"])
def test_every_format_says_what_images_the_encoder_takes(run, tmp_path, to):
    made, own = tmp_path / "made.pth.tar", read_weights(run)
    convert(run, made, "--to", to, "--which", "target")
    found = read_weights(made)
    assert dataclasses.replace(found.form, origin="") == dataclasses.replace(own.form, origin="")
    assert all(tensor.equal(own.tensors[name]) for name, tensor in found.tensors.items())
    assert pixels_of(read_config(made)) == pixels_of(read_config(run))  # evaluations decode as the run did


def images_of(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images as they are decoded, and as the network takes them."""
    form = read_weights(run).form
    images = torch.from_numpy(measured(2, form.channels, 16, 16, dtype=form.dtype))
    return images, normalise_pixels(images, form.mean_std)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_other_libraries_give_the_same_features(run, tmp_path, library):
    convert(run, tmp_path / "made", "--to", library)
    images, floats = images_of(run)
    form = read_weights(run).form
    if library == "timm":
        name, words = timm_arguments(form)
        model = timm.create_model(name, num_classes=0, checkpoint_path=str(tmp_path / "made/model.safetensors"), **words)
        found = model.eval().forward_features(floats)
    else:
        found = IJepaModel.from_pretrained(tmp_path / "made").eval()(floats).last_hidden_state
    torch.testing.assert_close(found, load_encoder(run).forward_features(floats), rtol=1e-3, atol=1e-3)


def test_an_encoder_takes_the_dtype_of_its_training_or_floats(run):
    encoder = load_encoder(run)
    images, floats = images_of(run)
    if images.dtype == torch.uint16:
        torch.testing.assert_close(encoder.forward_features(images), encoder.forward_features(floats), rtol=1e-3, atol=1e-3)
    unit = "1" if encoder.form.dtype == "float32" else "65535"
    with pytest.raises(UserError, match=rf"normalised with mean_std, {unit} counted as 1, not uint8; normalise them so"):
        encoder.forward_features(torch.zeros_like(images, dtype=torch.uint8))


@pytest.mark.slow
def test_exported_programs_give_the_same_features(tmp_path):
    run = write_array_run(tmp_path, "float32 bands")
    _, floats = images_of(run)
    expected = load_encoder(run).forward_features(floats)
    convert(run, tmp_path / "made.onnx", "--to", "onnx")
    (found,) = onnxruntime.InferenceSession(tmp_path / "made.onnx").run(None, {"images": floats.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    convert(run, tmp_path / "made.pt2", "--to", "pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "made.pt2").module()(floats), expected, rtol=1e-3, atol=1e-3)


def test_weights_that_do_not_say_their_mean_are_refused_by_name(tmp_path):
    shapes = {f"blocks.{i}.mlp.fc1.weight": (768, 192) for i in range(12)}  # those of a ViT-T tell the heads
    shapes |= {"patch_embed.proj.weight": (192, 12, 16, 16), "pos_embed": (1, 4, 192)}
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "twelve.pth")
    with pytest.raises(UserError, match=r"twelve.pth: takes images of 12 channels, and does not say their mean"):
        load_encoder(tmp_path / "twelve.pth", grid=(2, 2))
