"""Augmented training images for evaluations: every draw is a function of (seed, view, image), never of the order of work.

Views keep the channels and the dtype of their images. RandAugment's colours are those of pictures of 8 bits; arrays take its
geometry alone, and what moves in at their edges has the mean of its channel, as a value without measurement has.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastjepa.data.crops import BLOCKS_PER_SAMPLE, CROP_TRIES, crop_box, crop_image
from fastjepa.data.pixels import RGB_PICTURES, Pixels
from fastjepa.evals.scoring import VIEW_DRAW
from fastjepa.rng import SPLIT_STREAM, generator

CROP_SCALE = (0.08, 1.0)  # torchvision's and VISSL's default
RAND_OPS, RAND_MAGNITUDE = 2, 9  # Cubuk et al. 2020
GEOMETRY = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")  # torchvision's names


@dataclass(frozen=True)
class Augment:
    """Random resized crop (area 0.08 to 1, aspect 3/4 to 4/3), a flip with probability 1/2, then RandAugment if asked for.

    One Augment is one view: an epoch of fine-tuning, or one of `--views`.
    """

    seed: int
    view: int
    rand_augment: bool = False
    pixels: Pixels = RGB_PICTURES  # of the images

    def __call__(self, image: Tensor, row: int, size: tuple[int, int]) -> Tensor:
        """Return a view (C, *size) of a (C, h, w) image of any dtype, `row` of its source."""
        draws = generator(self.seed, SPLIT_STREAM, VIEW_DRAW + self.view, row * BLOCKS_PER_SAMPLE).random(4 * CROP_TRIES + 2)
        image = crop_image(image, crop_box(*image.shape[1:], CROP_SCALE, draws), size, flip=draws[-2] < 0.5)
        if not self.rand_augment:
            return image
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(draws[-1] * 2**53))
            return self._rand_augmented(image)

    def _rand_augmented(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2 import RandAugment  # here: torchvision takes seconds to import

        if self.pixels.are_pictures:
            return RandAugment(RAND_OPS, RAND_MAGNITUDE)(image)
        moved = geometric_augment()(RAND_OPS, RAND_MAGNITUDE, fill=self.pixels.fill.flatten().tolist())(image.float())
        return moved if image.is_floating_point() else moved.round().to(image.dtype)


@cache
def geometric_augment() -> type:
    """Return torchvision's RandAugment with the operations of GEOMETRY alone."""
    from torchvision.transforms.v2 import RandAugment

    class GeometricAugment(RandAugment):
        _AUGMENTATION_SPACE = {name: RandAugment._AUGMENTATION_SPACE[name] for name in GEOMETRY}

    return GeometricAugment
