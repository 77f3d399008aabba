"""Keys of the section `data`."""

import os
from dataclasses import dataclass
from typing import Literal

from fastjepa.config.fields import (
    ValueCheck,
    config_key,
    is_not_negative,
    is_positive,
    is_share_or_zero,
    is_share_range,
)

UNITS = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}  # by data.dtype: the value that counts as 1
# (mean, deviation) of ImageNet's channels, where 255 counts as 1; of one channel their averages.
IMAGENET = {1: ((0.449,), (0.226,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
MeanStd = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class DataConfig:
    """Images, their crops, and how they are loaded."""

    source: str | None = config_key(
        None, "a directory, or a data set's name (fashion-mnist, cifar10); replaces root_path + image_folder"
    )
    root_path: str | None = config_key(None, "official: directory that holds image_folder")
    image_folder: str | None = config_key(None, "official: image folder below root_path")
    batch_size: int = config_key(64, "images per rank per optimizer step", is_positive)
    crop_size: int | tuple[int, int] = config_key(224, "side of the square training image in pixels, or [height, width]")
    crop_scale: tuple[float, float] = config_key(
        (0.3, 1.0), "area of the random resized crop as a share of the image", is_share_range
    )
    use_horizontal_flip: bool = config_key(False, "mirror every image with probability 1/2")
    use_color_distortion: bool = config_key(
        False, "RGB: jitter of brightness, contrast, saturation and hue with probability 0.8, then grey with 0.2"
    )
    color_jitter_strength: float = config_key(
        0.0,
        "use_color_distortion: what the official reach, 0.8 0.8 0.8 and for hue 0.2, is multiplied by; 0: grey alone",
        ValueCheck(lambda v: 0 <= v <= 2.5, "in [0, 2.5]: at 2.5 a hue may become any other"),
    )
    use_gaussian_blur: bool = config_key(False, "blur with probability 1/2, of a deviation from 0.1 to 2 pixels")
    num_workers: int = config_key(8, "loader processes per rank; 0 loads in the training process", is_not_negative)
    pin_mem: bool = config_key(True, "page-locked host memory for asynchronous copies to the GPU")
    loader: Literal["auto", "dali", "torch"] = config_key(
        "auto",
        "which decoder makes images of files; auto: dali on a GPU where it is installed, else torch; idx files need none",
    )
    decode_threads: int | None = config_key(None, "dali: CPU threads that decode; default: as many as num_workers", is_positive)
    prefetch: int = config_key(
        2, "micro-batches that each loader process, and dali, makes ahead of the training step", is_positive
    )
    hw_decoder_load: float = config_key(
        0.65,
        "dali: share of the JPEGs given to a GPU's hardware decoder, where it has one",
        is_share_or_zero,
    )
    max_bad: int = config_key(100, "undecodable files a run may meet before it stops", is_not_negative)
    channels: int = config_key(
        3, "image channels: 1 (grey) or 3 (RGB) of 8 bits, made of any picture; or as many as the files have bands", is_positive
    )
    dtype: Literal["uint8", "uint16", "float32"] = config_key(
        "uint8",
        "what an image's values are, from the file to the network; uint8 and uint16 are those of the files; float32 takes "
        "any real numbers",
    )
    bands: tuple[int, ...] | None = config_key(
        None,
        "which bands of a file are the channels, counted from 0, in this order, such as [3, 2, 1]; default: all of them",
        ValueCheck(lambda v: bool(v) and min(v) >= 0, "one or more whole numbers, 0 or greater"),
    )
    pages: Literal["first", "bands"] = config_key("first", "of a TIFF with several pages: the first, or the bands of all")
    scale: float | None = config_key(
        None,
        "the value of a file that counts as 1 in mean and std; 1: they are in the units of the file; default: 255 (uint8), "
        "65535 (uint16), 1 (float32)",
        is_positive,
    )
    nodata: float | None = config_key(
        None, "the value of a file that means no measurement, as NaN and infinities always do; it is filled with the mean"
    )
    mean: tuple[float, ...] | None = config_key(
        None, "per-channel mean, in units of scale; default: ImageNet's, of 1 or 3 channels of uint8 alone"
    )
    std: tuple[float, ...] | None = config_key(None, "per-channel standard deviation of the same")

    @property
    def unit(self) -> float:
        """Return the value that counts as 1 in the network's own mean and deviation: the largest of a whole number's dtype."""
        return UNITS[self.dtype]

    @property
    def mean_std(self) -> MeanStd | None:
        """Return per-channel (mean, std) where `unit` counts as 1; None where they are neither given nor ImageNet's."""
        known = IMAGENET.get(self.channels, (None, None)) if self.dtype == "uint8" else (None, None)
        ratio = (self.scale or self.unit) / self.unit
        given = [values and tuple(value * ratio for value in values) for values in (self.mean, self.std)]
        mean, std = (values or default for values, default in zip(given, known, strict=True))
        return (mean, std) if mean and std else None

    @property
    def address(self) -> str:
        """Return the name, path or address of the data set, the official keys joined to one path; "" where none is set."""
        return self.source or os.path.join(self.root_path or "", self.image_folder or "")
