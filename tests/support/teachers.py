"""A frozen teacher in a folder of its own, unlike the network that learns from it."""

from pathlib import Path

import torch

from fastjepa.weights.hub_folders import write_fastjepa
from fastjepa.weights.pretrained import EncoderForm, PretrainedEncoder
from tests.support.networks import perturbed

MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.3, 0.25)


def write_teacher(folder: Path, patch_size: int = 8, grid: tuple[int, int] = (4, 4), seed: int = 0, **form: object) -> Path:
    """Write a network 48 wide and 3 deep for `grid` patches; `form` replaces fields of EncoderForm. Return the folder."""
    shape = {"embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_hidden": 96, "layer_norm_eps": 1e-5}
    size = tuple(count * patch_size for count in grid)
    shown = {"image_size": size, "patch_size": patch_size, "channels": 3, "mean": MEAN, "std": STD}
    made = EncoderForm(**{**shape, **shown, "which": "target", "origin": "a test", **form})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = perturbed(PretrainedEncoder(made), seed)
    write_fastjepa(folder, made, encoder.state_dict())
    return folder
