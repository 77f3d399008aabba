"""For torch.hub: `torch.hub.load("OWNER/fastjepa", "encoder", "encoders/h14")` needs no installation."""

import importlib.util
import sys
from pathlib import Path

dependencies = ["torch", "torchvision", "numpy", "PIL", "simplejpeg", "yaml", "safetensors", "rich"]

if importlib.util.find_spec("fastjepa_kernels") is None:
    sys.path.append(str(Path(__file__).parent / "kernels"))


def encoder(path, which=None, positions=None, grid=None):
    """Load a pretrained encoder, as `fastjepa.load_encoder` does: `forward_features(images)` gives (B, N, D)."""
    from fastjepa import load_encoder

    return load_encoder(path, which, positions, grid)
