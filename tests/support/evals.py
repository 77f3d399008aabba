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

GREY = ((0.5,), (0.25,))
SMALL = {
    "data": {"crop_size": 16, "channels": 1, "mean": [0.5], "std": [0.25]},
    "mask": {"patch_size": 4},
    "meta": {"model_name": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "pred_depth": 1, "pred_emb_dim": 32},
}


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


def write_run(root: Path, change: float = 0.5, step: int = 3) -> Path:
    """A run directory with one checkpoint whose encoders differ from each other and, by `change`, from untrained ones."""
    small = config_from_dict(SMALL, "test")
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
