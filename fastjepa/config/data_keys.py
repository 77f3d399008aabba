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
    use_color_distortion: bool = config_key(False, "official key", unsupported="I-JEPA trains without it; set it to false")
    use_gaussian_blur: bool = config_key(False, "official key", unsupported="I-JEPA trains without it; set it to false")
    color_jitter_strength: float = config_key(0.0, "official key", unsupported="there is no colour distortion; set it to 0.0")
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
    channels: int = config_key(3, "image channels: 1 (grey) or 3 (RGB)", ValueCheck(lambda v: v in (1, 3), "1 or 3"))
    mean: tuple[float, ...] | None = config_key(None, "per-channel mean of pixels that count from 0 to 1; default: ImageNet's")
    std: tuple[float, ...] | None = config_key(None, "per-channel standard deviation of the same; default: ImageNet's")

    @property
    def address(self) -> str:
        """Return the name, path or address of the data set, the official keys joined to one path; "" where none is set."""
        return self.source or os.path.join(self.root_path or "", self.image_folder or "")
