"""Labelled features without an encoder."""

import torch

from fastjepa.evals.scoring import Features


def blobs(n: int, spread: float = 0.3, classes: int = 4, dim: int = 8, seed: int = 0) -> Features:
    """Gaussian clusters around fixed centres; another seed gives other samples of the same classes."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return Features(centres[y] + spread * torch.randn(n, dim, generator=generator), y)
