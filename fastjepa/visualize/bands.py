"""Images of any number of channels and any depth as pictures: bands chosen of them, stretched to 8 bits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastjepa.data.pixels import Pixels
from fastjepa.errors import UserError
from fastjepa.visualize.pca import to_uint8

STRETCH_PERCENTILES = (2, 98)  # of a band's values: black and white


@dataclass(frozen=True)
class ShownBands:
    """Bands of images that are shown: one in grey, or three as red, green and blue.

    Pictures of 8 bits are shown as they are. Bands of arrays are stretched, each between two percentiles of its values in all
    images of a sheet, so that these can be compared; a band that does not vary is mid grey.
    """

    channels: tuple[int, ...]  # one or three
    bands: tuple[int, ...]  # their numbers in a file
    stretched: bool

    @classmethod
    def of(cls, pixels: Pixels, bands: Sequence[int] | None = None) -> "ShownBands":
        """Choose bands by their numbers in a file, from 0; default: the first three, the first of one or two.

        UserError for a band that the network does not see.
        """
        seen = pixels.bands or tuple(range(pixels.channels))
        chosen = tuple(bands or seen[: 3 if pixels.channels >= 3 else 1])
        if unknown := [band for band in chosen if band not in seen]:
            those = ", ".join(map(str, seen)) if pixels.bands else f"0 to {pixels.channels - 1}"
            raise UserError(f"--bands {unknown[0]}: the network sees the bands {those}; choose one or three of them")
        return cls(tuple(map(seen.index, chosen)), chosen, not pixels.are_pictures)

    def __str__(self) -> str:
        """Return the sentence that says how bands are shown."""
        colours = "in grey" if len(self.bands) == 1 else "as red, green and blue"
        low, high = STRETCH_PERCENTILES
        stretched = f", stretched from percentile {low} to {high} of each over a sheet" if self.stretched else ""
        one = len(self.bands) == 1
        return f"{'band' if one else 'bands'} {', '.join(map(str, self.bands))} {colours}{stretched}"

    def pictures(self, images: Iterable[Tensor]) -> list[np.ndarray]:
        """Return images, each (C, h, w), as pictures (h, w, 3) uint8."""
        shown = [image[list(self.channels)].cpu() for image in images]
        if self.stretched:
            values = torch.cat([image.float().flatten(1) for image in shown], dim=1).numpy()  # (1 or 3, pixels of all)
            low, high = np.percentile(values, STRETCH_PERCENTILES, axis=1)[:, :, None, None]
            span = np.where(high > low, high - low, np.inf)
            shown = [torch.from_numpy(np.where(high > low, (image.float().numpy() - low) / span, 0.5)) for image in shown]
        return [to_uint8(image[None])[0] for image in shown]
