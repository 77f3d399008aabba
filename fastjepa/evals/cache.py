"""Features kept on the disk, under a name made of all that shapes them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from fastjepa.data.sources import Source
from fastjepa.evals.scoring import Features
from fastjepa.files import write_atomic


def weights_fingerprint(network: nn.Module) -> str:
    """Return the SHA-256 of every name, dtype, shape and value of a network's weights, and of its norms' epsilons."""
    digest = hashlib.sha256(str([m.eps for m in network.modules() if isinstance(m, nn.LayerNorm)]).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def images_fingerprint(source: Source, rows: np.ndarray) -> str:
    """Return the SHA-256 of the names and labels of the images taken, all that is known of data without reading it."""
    text = "".join(f"{source.name(int(row))}\t{source.label(int(row))}\n" for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()


def cached_features(make: Callable[[], Features], folder: Path | None, key: dict[str, Any]) -> Features:
    """Return the features kept in `folder` under a name made of `key`, or make and keep them; without a folder, make them.

    The key must name all that shapes the features. Pixels edited in place under an unchanged file name go unnoticed.
    """
    if folder is None:
        return make()
    text = json.dumps(key, sort_keys=True)
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    if not file.is_file():
        features = make()
        write_atomic(file, save({"x": features.x.contiguous(), "y": features.y}, {"key": text}))
        return features
    try:
        with safe_open(file, "pt") as stored:
            return Features(stored.get_tensor("x"), stored.get_tensor("y"))
    except SafetensorError as error:
        raise OSError(f"{file}: cached features cannot be read ({error}); delete the file") from error
