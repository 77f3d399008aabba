"""Commands before a training, of a config of many bands: memory, masks, the machine."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastjepa.cli.main import main
from tests.support.evals import write_array_run


@pytest.fixture(scope="module", params=["float32 bands", pytest.param("uint16 grey", marks=pytest.mark.slow)])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_array_run(tmp_path_factory.mktemp("arrays"), request.param) / "config.yaml"


def said(capsys, *words: object) -> dict:
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_counts_the_channels(config, capsys):
    """Parameters of the patch embedding grow with the channels, whose mean and deviation a plan does not need."""
    unknown = ["data.mean=null", "data.std=null"]
    many = said(capsys, "plan", "--config", config, *unknown)
    two = said(capsys, "plan", "--config", config, *unknown, "data.channels=2")
    channels = json.loads(config.read_text())["data"]["channels"]
    own = 4 * (channels - 2) * 4**2 * 32  # bytes of fp32: patches of 4 pixels, width 32
    found, other = (plan["stages"]["0"] for plan in (many, two))
    assert found["parameters"] - other["parameters"] == own
    more = (many["flops_per_image"] - two["flops_per_image"]) / (channels - 2) / (2 * 4**2 * 32)  # patches that are embedded
    assert 16 < more < 3 * 16  # all 16 by the target encoder, some by the context encoder, whose weights have a gradient


def test_masks_are_drawn_over_images(config, tmp_path, capsys):
    picture = tmp_path / "masks.png"
    said(capsys, "masks", "--config", config, "--groups", 10, "--picture", picture)
    assert np.asarray(Image.open(picture))[40:120, :60].std() > 20


def test_the_doctor_weighs_a_batch(config, capsys):
    """A batch carries four bytes of each float, and two of each value of 16 bits; indices of patches are little beside them."""
    ((_, _, why),) = said(capsys, "doctor", "--config", config, "data.batch_size=4096")["shared memory"]
    images = 4096 * 16 * 16 * (12 * 4 if "float32" in config.read_text() else 2) / 2**20
    found = float(re.search(r"micro-batches of ([0-9.]+) MiB", why)[1])
    assert images < found < 1.5 * images + 1
