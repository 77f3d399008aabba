"""Colour distortion and Gaussian blur of crops: the official transforms behind crop and flip, which are SimCLR's.

Chen et al. 2020, appendix A: with probability 0.8 brightness, contrast, saturation and hue change, in random order; then a
fifth of the crops turn grey; then half of them are blurred. Values are fp32 in between and rounded once, at the end.

A crop gets the same bits on every device, in any batch and with any number of threads: what is computed is additions,
multiplications and divisions, each rounded by itself (no `lerp`, `addcmul` or `alpha`, which may round once for two), and the
one sum over pixels is exact in any order.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

JITTER_PROBABILITY, GREY_PROBABILITY, BLUR_PROBABILITY = 0.8, 0.2, 0.5
JITTER_REACH = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation: 1 +- that; hue: +- that part of the circle
JITTER_ORDERS = tuple(itertools.permutations(range(4)))  # of brightness, contrast, saturation and hue
BLUR_SIGMA = (0.1, 2.0)  # least and greatest standard deviation of the Gaussian in pixels
BLUR_RADIUS = 6  # pixels on each side that the Gaussian counts: three of its greatest standard deviations
DISTORTION_BLOCKS = 3  # random blocks of four doubles that a crop owns: it takes nine numbers
LUMINANCE = (0.2989, 0.587, 0.114)  # of red, green and blue, as torchvision has it
WHITE = 255.0
CACHED_VALUES = 1 << 19  # values of a tensor that a core works on fastest: three images of 224 px

# Columns of the numbers by which a crop is distorted.
ORDER, FACTORS, GREY, WEIGHTS = 0, slice(1, 5), 5, slice(6, 7 + BLUR_RADIUS)


@dataclass(frozen=True)
class Distortions:
    """Kinds of distortion of a run's crops; none by default."""

    colour: bool = False  # jitter and grey, of RGB alone
    strength: float = 0.0  # of the jitter, 0 for none: what JITTER_REACH is multiplied by
    blur: bool = False

    def draw(self, uniforms: Sequence[float]) -> list[float]:
        """Return the 13 numbers by which one crop is distorted, made of nine in [0, 1).

        They are the row of JITTER_ORDERS, or -1 for no jitter; three factors and the shift of the hue; 1 for grey, else 0;
        and the weights of the blur by their distance in pixels, 0 to 6, or zeros for none.
        """
        jitter, order, *factors, grey, blur, sigma = uniforms[:9]
        jittered = self.colour and self.strength > 0 and jitter < JITTER_PROBABILITY
        reach = [self.strength * most for most in JITTER_REACH]
        # A factor is at least 0, as in torchvision: a strength of 2 draws brightness from [0, 2.6).
        ranges = [(max(0.0, 1 - r), 1 + r) for r in reach[:3]] + [(-reach[3], reach[3])]
        weights = (
            blur_weights(_between(BLUR_SIGMA, sigma)) if self.blur and blur < BLUR_PROBABILITY else [0.0] * (1 + BLUR_RADIUS)
        )
        return [
            int(order * len(JITTER_ORDERS)) if jittered else -1,
            *map(_between, ranges, factors),
            int(self.colour and grey < GREY_PROBABILITY),
            *weights,
        ]


def _between(ends: tuple[float, float], share: float) -> float:
    """Return the number that lies so far between two ends, 0 at the first."""
    return ends[0] + (ends[1] - ends[0]) * share


def blur_weights(sigma: float) -> list[float]:
    """Return the weights of a Gaussian at 0 to BLUR_RADIUS pixels from its middle; those of both sides add up to 1."""
    weights = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(BLUR_RADIUS + 1)]
    total = 2 * sum(weights) - weights[0]
    return [weight / total for weight in weights]


def distorted(images: Tensor, drawn: Tensor) -> Tensor:
    """Return images (b, C, H, W), each distorted by its row of `drawn` (b, 13) fp32, which lies on the host.

    Dtype and device stay. Colours need uint8 and C = 3. Nothing waits for the device.
    """
    at_once = len(images) if images.device.type != "cpu" else max(1, CACHED_VALUES // images[0].numel())
    return torch.cat([_distorted(*part) for part in zip(images.split(at_once), drawn.split(at_once), strict=True)])


def _distorted(images: Tensor, drawn: Tensor) -> Tensor:
    """Return the images as `distorted` does; those that change alike, in the same place of their order, are one call."""
    numbers = drawn.numpy()
    orders = np.array([JITTER_ORDERS[int(row)] if row >= 0 else (-1,) * 4 for row in numbers[:, ORDER]])  # (b, 4)
    values = images.to(torch.float32, copy=True)
    for place, which in itertools.product(range(4), range(4)):
        values = _changed(values, orders[:, place] == which, JITTERS[which], numbers[:, FACTORS][:, which, None])
    values = _changed(values, numbers[:, GREY] > 0, lambda rgb, _: luminance(rgb).repeat(1, 3, 1, 1), numbers[:, :0])
    values = _changed(values, numbers[:, WEIGHTS][:, 0] > 0, blurred, numbers[:, WEIGHTS])
    return values if images.is_floating_point() else values.round().to(images.dtype)


def _changed(values: Tensor, chosen: np.ndarray, change: Callable[[Tensor, Tensor], Tensor], numbers: np.ndarray) -> Tensor:
    """Return values (b, C, H, W) whose rows `chosen` (b,) bool are replaced by change(these, their numbers (n, k, 1, 1))."""
    if not chosen.any():
        return values
    given = _sent(numbers[chosen], values.device)[..., None, None]
    if chosen.all():
        return change(values, given)
    rows = _sent(np.flatnonzero(chosen), values.device)
    return values.index_copy_(0, rows, change(values[rows], given))


def _sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Return numbers of the host on a device; the host does not wait for it."""
    here = torch.from_numpy(numbers)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here


def luminance(rgb: Tensor) -> Tensor:
    """Return (b, 1, H, W), the weighted sum of (b, 3, H, W)."""
    red, green, blue = (channel * weight for channel, weight in zip(rgb.split(1, dim=1), LUMINANCE, strict=True))
    return red.add_(green).add_(blue)


def brightened(rgb: Tensor, factor: Tensor) -> Tensor:
    """Return (b, 3, H, W) times a factor (b, 1, 1, 1), cut at white."""
    return (rgb * factor).clamp_(0, WHITE)


def contrasted(rgb: Tensor, factor: Tensor) -> Tensor:
    """Return (b, 3, H, W) with their distance to the image's mean luminance times a factor (b, 1, 1, 1), cut to [0, 255].

    Luminance counts in 256ths here: whole numbers have the same sum in any order.
    """
    total = (luminance(rgb) * 256).round_().sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    mean = (total / (256 * rgb[0, 0].numel())).float()
    return (rgb - mean).mul_(factor).add_(mean).clamp_(0, WHITE)


def saturated(rgb: Tensor, factor: Tensor) -> Tensor:
    """Return (b, 3, H, W) with their distance to each pixel's luminance times a factor (b, 1, 1, 1), cut to [0, 255]."""
    grey = luminance(rgb)
    return (rgb - grey).mul_(factor).add_(grey).clamp_(0, WHITE)


def hue_shifted(rgb: Tensor, shift: Tensor) -> Tensor:
    """Return (b, 3, H, W) with each hue moved by a part (b, 1, 1, 1) of the circle; value and saturation (HSV) stay.

    A hue counts from 0 to 6: red is 0, green 2, blue 4. Orange (255, 128, 0) has (128 - 0) / 255 = 0.5; shifted by 1/6 it has
    1.5 and is (128, 255, 0).
    """
    red, green, blue = rgb.split(1, dim=1)
    high, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    span = chroma.clamp(min=1e-6)  # of grey pixels the differences below are 0
    hue = torch.where(high == green, (blue - red).div_(span).add_(2), (red - green).div_(span).add_(4))
    hue = torch.where(high == red, (green - blue).div_(span), hue).add_(6 * shift)
    hue.sub_((hue / 6).floor_().mul_(6))  # into [0, 6]
    shares = torch.empty_like(rgb)  # of the chroma: red |hue - 3| - 1, green 2 - |hue - 2|, blue 2 - |hue - 4|, cut to [0, 1]
    for share, middle, sign, least in zip(shares.split(1, dim=1), (3, 2, 4), (1, -1, -1), (-1, 2, 2), strict=True):
        torch.sub(hue, middle, out=share).abs_().mul_(sign).add_(least)
    return shares.clamp_(0, 1).mul_(chroma).add_(low)


def blurred(images: Tensor, weights: Tensor) -> Tensor:
    """Return (b, C, H, W) under a Gaussian of such weights (b, 7, 1, 1); beyond the edge its pixels go on, as in Pillow."""
    weights = weights.split(1, dim=1)
    for dim, margin in ((2, (0, 0, BLUR_RADIUS, BLUR_RADIUS)), (3, (BLUR_RADIUS, BLUR_RADIUS, 0, 0))):
        size, padded = images.shape[dim], pad(images, margin, mode="replicate")
        images = padded.narrow(dim, BLUR_RADIUS, size) * weights[0]
        for away in range(1, BLUR_RADIUS + 1):
            sides = padded.narrow(dim, BLUR_RADIUS - away, size) + padded.narrow(dim, BLUR_RADIUS + away, size)
            images.add_(sides.mul_(weights[away]))
    return images


JITTERS = (brightened, contrasted, saturated, hue_shifted)
