"""Runs and labelled images for evaluations, written in a moment."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastjepa.checkpoint.save import save_checkpoint
from fastjepa.checkpoint.state import TrainState
from fastjepa.config.load import config_from_dict
from fastjepa.engine.adamw import build_adamw
from fastjepa.model.jepa import build_pair
from tests.support.arrays import write_shapes

GREY = ((0.5,), (0.25,))
SMALL = {
    "data": {"crop_size": 16, "channels": 1, "mean": [0.5], "std": [0.25]},
    "mask": {"patch_size": 4},
    "meta": {"model_name": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "pred_depth": 1, "pred_emb_dim": 32},
}


ARRAYS = {  # of data: values below 10,000 count as reflectances
    "float32 bands": {"dtype": "float32", "channels": 12, "scale": 10000, "mean": [0.3] * 12, "std": [0.25] * 12},
    "uint16 bands": {"dtype": "uint16", "bands": [5, 3, 2, 1], "scale": 10000, "mean": [0.3] * 4, "std": [0.25] * 4},
    "uint16 grey": {"dtype": "uint16", "channels": 1, "scale": 10000, "mean": [0.3], "std": [0.25]},
}


def write_array_run(root: Path, kind: str) -> Path:
    """A run directory over root/set, 24 training and 12 test images of 20 pixels as `write_shapes` makes them."""
    keys = ARRAYS[kind]
    for split, count in (("train", 24), ("test", 12)):
        write_shapes(root / "set", count, 20, 1 if kind == "uint16 grey" else 12, keys["dtype"], split)
    data = {"crop_size": 16, "source": str(root / "set"), "batch_size": 8, "num_workers": 0} | keys
    return write_run(root / "run", shape=SMALL | {"data": data, "mask": {"patch_size": 4, "min_keep": 0}})


def write_images(root: Path, train: int = 40, test: int = 20, size: tuple[int, int] = (16, 16), classes: int = 2) -> Path:
    """A folder of grey PNGs, train/ and test/, whose class c has mean brightness 60 + 100 c."""
    noise = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for i in range(count):
            folder = root / split / f"class{i % classes}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(noise.normal(60 + 100 * (i % classes), 25, size), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return root


def write_run(root: Path, change: float = 0.5, step: int = 3, shape: dict = SMALL) -> Path:
    """A run directory with one checkpoint whose encoders differ from each other and, by `change`, from untrained ones."""
    small = config_from_dict(shape, "test")
    jepa, target = build_pair(small)
    with torch.no_grad():
        for factor, encoder in ((1 + change, target), (1 - change, jepa.encoder)):
            for parameter in encoder.parameters():
                parameter.mul_(factor)
    networks = {"encoder": jepa.encoder, "predictor": jepa.predictor, "target_encoder": target}
    state = TrainState(step, networks, build_adamw(jepa.encoder, jepa.predictor), record={"config": small.to_dict()})
    save_checkpoint(root / "checkpoints", state)
    (root / "config.yaml").write_text(json.dumps(small.to_dict()))  # JSON is YAML
    return root
