"""Makers of patch features: the outputs of one or several blocks of an encoder, or the pixels of the patches themselves."""

import torch
from torch import Tensor
from torch.nn.functional import unfold

from fastjepa.errors import UserError
from fastjepa.evals.inputs import Split, Subject, Which
from fastjepa.evals.lowlevel import Squash
from fastjepa.evals.patch_features import PatchMaker, encoder_patches


def layer_patches(subject: Subject, which: Which, layers: tuple[int, ...] | None, split: Split) -> PatchMaker:
    """Return the maker of features of whole pictures, squashed to the encoder's size.

    Args:
        layers: numbers of blocks from 1, whose outputs stand side by side, the final norm on each; None: the last one.
        split: where its pictures lose their colours, it is said.
    """
    encoder = subject.encoder(which, split)
    depth = len(encoder.blocks)
    chosen = tuple(sorted(set(layers or (depth,))))
    if not 1 <= chosen[0] <= chosen[-1] <= depth:
        wrong = next(layer for layer in chosen if not 1 <= layer <= depth)
        raise UserError(f"--layers {wrong}: the encoder has {depth} blocks; choose numbers from 1 to {depth}")
    last = encoder_patches(subject, encoder)
    patches, dim = last.shape

    def side_by_side(images: Tensor) -> Tensor:
        outputs = encoder(images, layers=chosen)  # (b * N, D) each
        return torch.cat([encoder.norm(x).view(len(images), patches, dim) for x in outputs], dim=2)

    key = last.key | {"squashed": True, "layers": chosen}
    return PatchMaker(side_by_side, (patches, dim * len(chosen)), key, Squash())


def raw_patches(subject: Subject) -> PatchMaker:
    """Return the maker of the normalised pixels of patches, channel by channel and row by row, (b, N, C * p * p)."""
    patch, channels = subject.config.mask.patch_size, subject.config.data.channels
    patches = (subject.size[0] // patch) * (subject.size[1] // patch)
    key = {"raw": patch, "channels": channels, "size": subject.size, "mean_std": subject.config.mean_std, "squashed": True}
    key |= subject.pixels_key

    def cut(images: Tensor) -> Tensor:
        return unfold(images.float(), patch, stride=patch).transpose(1, 2)

    return PatchMaker(cut, (patches, channels * patch * patch), key, Squash())
