"""A run of toy size: its config over 40 small images, its logged lines, its weights."""

import json
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from fastjepa.cli.main import main

TINY = {
    "data": {"batch_size": 8, "crop_size": 32, "num_workers": 1},
    "mask": {"patch_size": 4, "min_keep": 4, "truncate_group": 4},
    "meta": {"model_name": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "pred_depth": 2, "pred_emb_dim": 24},
    "optimization": {"epochs": 2, "warmup": 1, "ema": [0.9, 1.0]},
    "logging": {"every": 1, "monitor_every": 2},
    "runtime": {"dtype": "fp32", "device": "cpu", "threads": 1},
}


def write_config(directory: Path) -> Path:
    """A config over 40 small images: five steps an epoch, ten in all."""
    random = np.random.default_rng(0)
    for i in range(40):
        pixels = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 36)).save(directory / f"{i:02}.png")
    file = directory / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY | {"data": TINY["data"] | {"source": str(directory)}}))
    return file


def trained(config: Path, output: Path, *arguments: object) -> list[dict]:
    """Train in this process; return the logged lines."""
    assert main(["train", "--config", str(config), "--output", str(output), *map(str, arguments)]) == 0
    return lines(output)


def losses(entries: list[dict]) -> list[float]:
    return [entry["loss"] for entry in entries]


def distances(entries: list[dict]) -> list[float]:
    """The distances of the average, in updates, where they were read."""
    return [entry["ema_distance"] for entry in entries if "ema_distance" in entry]


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


TIMES = {"images_per_s", "cpu_s", "mfu", "memory_gib", "monitor_share"}


def without_times(entries: list[dict]) -> list[dict]:
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in entries]


def weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint that one process wrote, by file and name."""
    files = sorted((output / "checkpoints" / f"jepa-{step:08d}").glob("*.safetensors"))
    assert len(files) == 4
    return {f"{file.stem}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def wait_for_steps(output: Path, steps: int, seconds: float = 240.0) -> None:
    """Wait until a run has logged so many lines."""
    file, until = output / "metrics.jsonl", time.monotonic() + seconds
    while not file.exists() or file.read_text().count("\n") < steps:
        assert time.monotonic() < until, f"{output}: no {steps} lines within {seconds:g} s"
        time.sleep(0.02)
