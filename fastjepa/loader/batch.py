"""A micro-batch: images and their masks."""

from dataclasses import dataclass

from torch import Tensor

from fastjepa.data.decode_dali import Encoded
from fastjepa.masks.packed import Blocks, Movable, Packed


@dataclass(frozen=True)
class Batch(Movable):
    """A micro-batch of b images and their masks; K context masks an image."""

    images: Tensor | Encoded  # (b, C, H, W) uint8, uint16 or normalised fp32, or the files it is to be made of
    context: Packed  # K*b sequences of context patches
    target: Packed  # b sequences, the union of each image's target blocks
    blocks: Blocks  # the predictor's sequences: each context with each target block, or with all of them
    bad: tuple[str, ...]  # files replaced in this micro-batch
    reasons: tuple[str, ...] = ()  # why, one for each of them
    dropped: tuple[tuple[str, str], ...] = ()  # (file, kind of `data.dropped`), of the first epoch
