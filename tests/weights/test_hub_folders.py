"""Features in three lines, torch.hub, and the folder that the Hugging Face Hub takes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, IJepaConfig, IJepaModel

from fastjepa import load_encoder
from fastjepa.checkpoint.restore import load_networks
from fastjepa.checkpoint.save import save_checkpoint
from fastjepa.cli.main import main
from fastjepa.config.load import config_from_dict
from fastjepa.data.pixels import normalise_pixels
from fastjepa.errors import UserError
from fastjepa.evals.cache import weights_fingerprint
from fastjepa.evals.inputs import read_config
from fastjepa.model.jepa import build_pair
from fastjepa.weights.read import NETWORK_OF
from tests.support.places import ROOT
from tests.support.weights import IJEPA, SHAPE, convert, make_state, official_file


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run")
    save_checkpoint(path / "checkpoints", make_state(config_from_dict(SHAPE)))
    return path


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "encoder"
    convert(run, path, "--to", "fastjepa")
    return path


def test_features_in_three_lines(folder, run):
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)

    encoder = load_encoder(folder)
    features = encoder.forward_features(images)

    assert features.shape == (2, 24, 32)
    assert (encoder.which, encoder.image_size, encoder.patch_size, encoder.channels) == ("target", (32, 48), 8, 3)
    assert encoder.mean_std == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert encoder.origin == "fastjepa run, step 7"
    assert not encoder.training and not features.requires_grad
    jepa, target = build_pair(config_from_dict(SHAPE))
    target.load_state_dict(load_networks(run)["target_encoder"])
    assert torch.equal(features, target.features(images))


def test_bytes_are_normalised_and_floats_are_taken_as_they_are(folder):
    encoder = load_encoder(folder)
    pixels = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in encoder.mean_std)
    difference = encoder.forward_features(pixels) - encoder.forward_features((pixels / 255 - mean) / std)
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("images", "not_taken"),
    [
        (torch.zeros(3, 32, 48), r"of shape \(3, 32, 48\); images\[None\] makes a batch of one image"),
        (torch.zeros(32, 48), r"of shape \(32, 48\)"),
        (torch.zeros(32, 48, 3, dtype=torch.uint8), r"of shape \(32, 48, 3\)"),
        (torch.zeros(1, 1, 32, 48), r"of shape \(1, 1, 32, 48\)"),
        (torch.zeros(1, 4, 32, 48), r"of shape \(1, 4, 32, 48\)"),
        (torch.zeros(1, 32, 48, 3), r"of shape \(1, 32, 48, 3\)"),
        (torch.zeros(1, 1, 3, 32, 48), r"of shape \(1, 1, 3, 32, 48\)"),
        (torch.zeros(0, 3, 32, 48), r"of shape \(0, 3, 32, 48\)"),
        (torch.zeros(1, 3, 0, 48), r"of shape \(1, 3, 0, 48\)"),
        (torch.zeros(1, 3, 32, 50), r"of shape \(1, 3, 32, 50\)"),
        (np.zeros((1, 3, 32, 48), dtype=np.uint8), "ndarray"),
        ([torch.zeros(3, 32, 48)], "list"),
    ],
)
def test_what_is_no_batch_of_images_is_refused_in_one_sentence(folder, images, not_taken):
    taken = r"images must be a tensor \(b, 3, H, W\), H and W multiples of 8, not "
    with pytest.raises(UserError, match=f"^fastjepa run, step 7: {taken}{not_taken}$"):
        load_encoder(folder).forward_features(images)


def test_other_sizes_are_taken_where_positions_are_fixed(folder, tmp_path):
    assert load_encoder(folder).forward_features(torch.zeros(1, 3, 64, 40)).shape == (1, 40, 32)
    IJepaModel(IJepaConfig(**IJEPA, image_size=32)).save_pretrained(tmp_path / "learned")
    learned = load_encoder(tmp_path / "learned")
    assert learned.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 32)
    with pytest.raises(UserError, match="positions were learned for 32x32 pixels"):
        learned.forward_features(torch.zeros(1, 3, 64, 32))


WITHOUT_INSTALLATION = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
import importlib.util, torch
assert not any(importlib.util.find_spec(name) for name in ("fastjepa", "fastjepa_kernels"))
encoder = torch.hub.load(sys.argv[1], "encoder", sys.argv[2], source="local")
print(tuple(encoder.forward_features(torch.zeros(1, 3, 32, 48)).shape), encoder.which)
print(torch.hub.load(sys.argv[1], "encoder", sys.argv[2], which="target", source="local").which)
"""


def test_torch_hub_needs_no_installation(folder, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT_INSTALLATION), str(ROOT), str(folder)]
    found = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=120)
    assert found.stdout.splitlines()[-2:] == ["(1, 24, 32) target", "target"], found.stderr


def test_the_hubs_library_loads_the_folder(folder):
    """The weights go into a module of the same names; the card says what it is, and claims no licence."""
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    encoder = build_pair(config_from_dict(SHAPE))[1]
    outcome = huggingface_hub.load_torch_model(encoder, folder)
    assert not outcome.missing_keys and not outcome.unexpected_keys
    images = torch.randn(1, 3, 32, 48)
    assert torch.equal(encoder.features(images), load_encoder(folder).forward_features(images))
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == ("fastjepa", "image-feature-extraction", None)
    assert "**the target encoder**" in card.text and "fastjepa run, step 7" in card.text


@pytest.mark.parametrize("to", ["fastjepa", "timm", "transformers"])
def test_the_code_on_a_model_card_runs(run, tmp_path, to):
    convert(run, tmp_path / "out", "--to", to)
    text = (tmp_path / "out" / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0].replace("FOLDER", str(tmp_path / "out"))
    images = torch.randn(1, 3, 32, 48)
    names = {"images": images}
    exec(code, names)
    expected = load_encoder(run).forward_features(images)
    assert (names["features"] - expected).abs().max() < 1e-5


def test_the_image_processor_that_is_written_normalises_as_the_encoder(run, tmp_path):
    convert(run, tmp_path / "out", "--to", "transformers")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    given = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    encoder = load_encoder(run)
    expected = normalise_pixels(torch.from_numpy(pixels).permute(2, 0, 1)[None], encoder.mean_std)
    assert (given - expected).abs().max() < 1e-5


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize(
    "said",
    [
        {},
        IMAGENET,
        IMAGENET | {"do_normalize": False},
        IMAGENET | {"do_normalize": None},
        {"image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375], "do_rescale": False},
        IMAGENET | {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        IMAGENET | {"rescale_factor": 1 / 127.5},
        {"rescale_factor": 1 / 256, "do_normalize": False},
        {"image_mean": 0.5, "image_std": 0.25},
    ],
)
def test_a_folders_image_processor_is_honoured(tmp_path, said):
    IJepaModel(IJepaConfig(**IJEPA, image_size=32)).save_pretrained(tmp_path)
    said = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}} | said
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    given = AutoImageProcessor.from_pretrained(tmp_path)(Image.fromarray(pixels), return_tensors="pt")["pixel_values"].float()
    encoder = load_encoder(tmp_path)
    normalised = normalise_pixels(torch.from_numpy(pixels).permute(2, 0, 1)[None], encoder.mean_std)
    torch.testing.assert_close(normalised, given, rtol=1e-4, atol=1e-4)
    bytes_ = encoder.forward_features(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    torch.testing.assert_close(bytes_, encoder.forward_features(given), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (
            {"image_mean": [123.675, 116.28, 103.53]},
            "mean: 123.675 is not of .*divide values of 0..255 by 255: .0.485, 0.456, 0.406",
        ),
        ({"image_std": [58.395, 57.12, 57.375]}, "std: 58.395 is not of"),
        ({"image_mean": [-0.5, 0.5, 0.5]}, "mean: -0.5 must be 0 or greater"),
        ({"image_mean": [0.5]}, "mean: .0.5. must be 3 numbers"),
        ({"image_std": "half"}, "std: 'half' must be 3 numbers"),
        ({"rescale_factor": 0}, "rescale_factor: 0 must be a number greater than 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor: '1/255' must be a number"),
        ({"image_processor_type": "BitImageProcessor"}, "the defaults of BitImageProcessor are not known"),
    ],
)
def test_an_image_processor_that_cannot_be_is_refused_by_name(tmp_path, said, says):
    IJepaModel(IJepaConfig(**IJEPA, image_size=32)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=f"preprocessor_config.json: .*{says}"):
        load_encoder(tmp_path)


def test_an_official_file_is_evaluated_like_a_run(tmp_path, capsys):
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in (0, 1):
            (tmp_path / "data" / split / str(label)).mkdir(parents=True)
            for i in range(8):
                pixels = random.integers(120 * label, 120 * label + 100, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / str(label) / f"{i}.png")
    path, state = official_file(tmp_path / "jepa-ep300.pth.tar")
    command = ["eval", "knn", "--checkpoint", str(path), "--data", str(tmp_path / "data"), "--device", "cpu", "--no-cache"]
    for which in ("target", "context", "random"):
        assert main([*command, "--encoder", which]) == 0
        assert f"{which} encoder" in capsys.readouterr().out
    for which, network in NETWORK_OF.items():
        expected = weights_fingerprint(state.networks[network])
        assert weights_fingerprint(load_encoder(path, which)) == expected
    config = read_config(path)
    assert (config.meta.model_name, config.image_size, config.mask.patch_size) == ("vit_tiny", (32, 32), 8)
