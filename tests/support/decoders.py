"""A toy run with a decoder: its config, its images, and networks that are not as they began."""

from pathlib import Path

import torch

from fastjepa.evals.inputs import Split
from fastjepa.evals.scoring import TEST_DRAW, TRAIN_DRAW
from fastjepa.visualize.sheets import open_drawn_split

CONFIG = {
    "data": {"batch_size": 4, "crop_size": 64, "num_workers": 0},
    "mask": {"patch_size": 4},  # all else at its default: what official weights, which do not say it, are taken to have had
    "meta": {"model_name": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "pred_depth": 1, "pred_emb_dim": 24},
    "optimization": {"epochs": 1, "warmup": 0},
    "runtime": {"dtype": "fp32", "device": "cpu", "threads": 1},
}


def split(place: Path, name: str) -> Split:
    return open_drawn_split(str(place / "images"), name, 100, 0, TRAIN_DRAW if name == "train" else TEST_DRAW)


def stirred(network: torch.nn.Module) -> torch.nn.Module:
    """With weights so large that attention and the final norm's affine matter: after one step neither does."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return network
