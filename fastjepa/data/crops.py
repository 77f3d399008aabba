"""Random resized crops: the box that a crop takes, and the pixels in it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Box = tuple[int, int, int, int]  # (top, left, height, width) in pixels
CROP_ASPECT = (3 / 4, 4 / 3)  # width / height of a crop
CROP_TRIES = 10  # boxes tried before the central crop
BLOCKS_PER_SAMPLE = CROP_TRIES + 1  # random blocks of four doubles: one a try, and one for the flip
CROP_MARGIN = 256 / 224  # the short side before the central crop, as a share of the crop


@dataclass(frozen=True)
class Crops:
    """Random resized crops of a run's images."""

    size: tuple[int, int]  # (H, W) in pixels
    scale: tuple[float, float]  # least and greatest area of the box as a share of the image
    flip: bool  # whether half of them are mirrored

    def draw(self, height: int, width: int, uniforms: Sequence[float]) -> tuple[Box, bool]:
        """Return a crop's box, as `crop_box` draws it, and whether it is mirrored, which the number after those says."""
        return crop_box(height, width, self.scale, uniforms), self.flip and uniforms[4 * CROP_TRIES] < 0.5


def crop_box(height: int, width: int, scale: tuple[float, float], uniforms: Sequence[float]) -> Box:
    """Return the box of a random crop, as torchvision's RandomResizedCrop.get_params does, but from given numbers.

    Args:
        height, width: of the image in pixels.
        scale: least and greatest area of the box as a share of the image.
        uniforms: at least 4 * CROP_TRIES numbers in [0, 1): area, aspect, top and left of each try. The first box that lies
            within the image is taken; when none does, the largest central box of an allowed aspect.
    """
    low, high = math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])
    for t in range(0, 4 * CROP_TRIES, 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniforms[t])
        aspect = math.exp(low + (high - low) * uniforms[t + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(uniforms[t + 2] * (height - h + 1)), int(uniforms[t + 3] * (width - w + 1)), h, w
    h = min(height, round(width / CROP_ASPECT[0]))
    w = min(width, round(height * CROP_ASPECT[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_image(image: Tensor, box: Box, size: tuple[int, int], flip: bool = False) -> Tensor:
    """Return a box of a (C, H, W) image, resized to (C, *size) of its dtype by antialiased bilinear interpolation.

    Equal to torchvision's `resized_crop` on the same box; `flip` then mirrors it left to right.
    """
    top, left, height, width = box
    patch = image.narrow(1, top, height).narrow(2, left, width)
    if (height, width) != size:
        patch = _resized(patch, size)
    return patch.flip(-1) if flip else patch


def fit_to(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a (C, h, w) image as (C, *size): as it is when it has that size, else resized and centre-cropped.

    Resized is by antialiased bilinear interpolation with a margin of 8/7: for a square of 224 the short side becomes 256, as
    is usual on ImageNet.
    """
    shape = image.shape[1:]
    if tuple(shape) == tuple(size):
        return image
    wanted = [round(side * CROP_MARGIN) for side in size]
    tight = max((0, 1), key=lambda axis: wanted[axis] / shape[axis])  # the axis that bounds the scale
    resized = [int(wanted[tight] * side / shape[tight]) for side in shape]
    resized[tight] = wanted[tight]
    image = _resized(image, resized)
    top, left = (round((side - kept) / 2) for side, kept in zip(resized, size, strict=True))
    return image[:, top : top + size[0], left : left + size[1]]


def _resized(image: Tensor, size: Sequence[int]) -> Tensor:
    """Return a (C, h, w) image as (C, *size) of its dtype; uint16, which torch does not resize, in fp32 and rounded."""
    deep = image.dtype == torch.uint16
    resized = interpolate((image.float() if deep else image)[None], size=size, mode="bilinear", antialias=True)[0]
    return resized.round().to(torch.uint16) if deep else resized
