"""Patch features before any pooling: kept on the disk in bf16 where they fit, else made anew each time they are asked for."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastjepa.data.pixels import normalise_pixels
from fastjepa.data.prepare.processes import console
from fastjepa.engine.precision import autocast_of
from fastjepa.evals.images import Augmentation, EvalImages, watched
from fastjepa.evals.inputs import Split, Subject
from fastjepa.files import atomic_path
from fastjepa.model.vit import use_auto_attention

MEMORY_SHARE = 0.5  # of the free disk that patch features may take
IMAGES_A_BLOCK = 256  # images of one forward pass


PatchReader = Callable[[Tensor, int, str], Iterable[Tensor]]


@dataclass(frozen=True)
class PatchFeatures:
    """Patch features of n images of classes `y` (n,) int64.

    `read(rows, size, about)` yields the features of the images `rows` (m,), in blocks (size, N, D) bf16 on the evaluation's
    device, under a progress bar of the name `about`.
    """

    y: Tensor
    read: PatchReader


@dataclass(frozen=True)
class PatchMaker:
    """One way to make features of patches, on the evaluation's device."""

    make: Callable[[Tensor], Tensor]  # normalised images (b, C, H, W) -> (b, N, D)
    shape: tuple[int, int]  # N, D
    key: dict[str, Any]  # entries of a cache's key that name the way
    view: Augmentation | None = None  # brings an image to the evaluation's size; None: resized and cropped as usual


def encoder_patches(subject: Subject, encoder: nn.Module) -> PatchMaker:
    """Return the maker of an encoder's final-normed output."""
    encoder = encoder.to(subject.device)
    use_auto_attention(encoder, subject.device, subject.dtype)
    patches = math.prod(subject.size) // math.prod(encoder.patch_embed.proj.kernel_size)
    return PatchMaker(encoder.features, (patches, encoder.embed_dim), subject.encoder_key(encoder))


def held_patches(x: Tensor, device: str | torch.device = "cpu") -> PatchReader:
    """Return the reader of features (n, N, D) that are there, in memory or mapped from a file."""
    return lambda rows, size, about: (x[block].to(device) for block in watched(rows.split(size), about))


def held_in_memory(x: Tensor, y: Tensor, device: str | torch.device = "cpu") -> PatchFeatures:
    """Wrap features (n, N, D) that are there, in memory or mapped from a file."""
    return PatchFeatures(y, held_patches(x, device))


def streamed_patches(subject: Subject, maker: PatchMaker, split: Split) -> PatchReader:
    """Return the reader that makes the features of a split each time they are read."""

    def read(rows: Tensor, size: int, about: str) -> Iterator[Tensor]:
        images = EvalImages(split.source, subject.size, subject.pixels, split.rows[rows.numpy()], maker.view)
        for pixels in images.batches(size, about=about):
            with torch.inference_mode(), autocast_of(subject.dtype, subject.device):
                patches = maker.make(normalise_pixels(pixels.to(subject.device), subject.config.mean_std)).bfloat16()
            yield patches.clone()  # outside of inference mode: a probe learns from it

    return read


def kept_patches(subject: Subject, maker: PatchMaker, split: Split) -> PatchReader:
    """Return the reader of a split in the subject's cache, filled first where it is empty; without a cache it streams."""
    made = streamed_patches(subject, maker, split)
    if subject.cache is None:
        return made
    shape = (len(split.rows), *maker.shape)
    name = hashlib.sha256(json.dumps(maker.key | split.key, sort_keys=True).encode()).hexdigest()[:32]
    file = subject.cache / f"{name}.tokens.npy"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        needed, free = 2 * math.prod(shape), shutil.disk_usage(file.parent).free
        if needed > MEMORY_SHARE * free:
            console.print(f"{split.name}: {needed / 1e9:.1f} GB of patch features are above half of the {free / 1e9:.1f} GB "
                          f"free on {file.parent}: each epoch makes them anew")  # fmt: skip
            return made
        _write_features(file, made, shape)
    stored = np.load(file, mmap_mode="c")  # torch wants an array it could write to
    if stored.shape != shape:
        raise OSError(f"{file}: holds {stored.shape}, not {shape}; delete the file")
    return held_patches(torch.from_numpy(stored).view(torch.bfloat16), subject.device)


def patch_features_of(subject: Subject, encoder: nn.Module, split: Split) -> PatchFeatures:
    """Return an encoder's features of one split, with the classes of its images."""
    labels = EvalImages(split.source, subject.size, subject.pixels, split.rows).labels()
    return PatchFeatures(labels, kept_patches(subject, encoder_patches(subject, encoder), split))


def _write_features(file: Path, made: PatchReader, shape: tuple[int, ...]) -> None:
    """Write all of them as 16-bit integers, for NumPy has no bf16."""
    with atomic_path(file) as hidden:
        out, start = np.lib.format.open_memmap(hidden, "w+", np.int16, shape), 0
        for block in made(torch.arange(shape[0]), IMAGES_A_BLOCK, "patch features"):
            out[start : start + len(block)] = block.cpu().view(torch.int16).numpy()
            start += len(block)
        out.flush()
