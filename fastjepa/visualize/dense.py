"""Pictures of dense predictions: each row a test picture, the truth, and what each encoder and head makes of it."""

from collections.abc import Callable

import numpy as np

from fastjepa.data.pixels import RGB_PICTURES
from fastjepa.evals.dense.table import ShownPredictions
from fastjepa.visualize.bands import ShownBands
from fastjepa.visualize.images import HIDDEN_COLOUR, enlarged, picture_sheet

# Colours of classes that differ for most eyes (Okabe and Ito 2008), the first for what is behind; later classes repeat them.
CLASS_COLOURS = np.array([(60, 60, 60), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178),
                          (213, 94, 0), (204, 121, 167)], np.uint8)  # fmt: skip
NEAR_COLOUR, FAR_COLOUR = np.array((253, 231, 100.0)), np.array((40, 20, 90.0))
DENSE_TILE = 128  # pixels of a picture's longer side
DARKER = 0.6  # factor of the colours each time they repeat


def predictions_sheet(task: str, sample: ShownPredictions) -> np.ndarray:
    """Return a sheet with a row for each picture and a column for the truth and each prediction."""
    colour = {"segmentation": class_colours, "depth": depth_colours, "normals": normal_colours}[task]
    # Pictures are shown in colour, whether or not the network saw it.
    pixels = RGB_PICTURES if sample.pixels.are_pictures else sample.pixels
    pictures, rows = ShownBands.of(pixels).pictures(pixels.decode(content).image for content in sample.pictures), []
    for i, (picture, truth) in enumerate(zip(pictures, sample.truth, strict=True)):
        paint = colour(truth)
        rows.append([tile(picture), tile(paint(truth)), *(tile(paint(found[i])) for found in sample.predicted.values())])
    headings = [name.replace(" patches", "").replace(" encoder", "").replace(", ", "\n") for name in sample.predicted]
    return picture_sheet(rows, headings=["picture", "truth", *headings])


def tile(image: np.ndarray) -> np.ndarray:
    """Return (h, w, 3) with its longer side as near to DENSE_TILE as whole pixels come, by repeating or leaving out pixels."""
    height, width = image.shape[:2]
    longer = max(height, width)
    if longer <= DENSE_TILE:
        times = DENSE_TILE // longer
        return image.repeat(times, axis=0).repeat(times, axis=1)
    return enlarged(image[None], (max(1, height * DENSE_TILE // longer), max(1, width * DENSE_TILE // longer)))[0]


def class_colours(truth: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the painter of classes (H, W); what the truth does not count is grey in all of a row."""

    def paint(classes: np.ndarray) -> np.ndarray:
        factor = DARKER ** (classes // len(CLASS_COLOURS))
        colours = (CLASS_COLOURS[classes % len(CLASS_COLOURS)] * factor[..., None]).astype(np.uint8)
        return np.where((truth < 0)[..., None], np.uint8(HIDDEN_COLOUR), colours)

    return paint


def depth_colours(truth: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the painter of depths (1, H, W), near ones bright, between the least and the greatest that are true."""
    known = truth > 0
    low, high = (float(truth[known].min()), float(truth[known].max())) if known.any() else (0.0, 1.0)

    def paint(depth: np.ndarray) -> np.ndarray:
        share = np.clip((depth[0] - low) / max(high - low, 1e-6), 0, 1)[..., None]
        colours = (NEAR_COLOUR * (1 - share) + FAR_COLOUR * share).astype(np.uint8)
        return np.where(known[0][..., None], colours, np.uint8(HIDDEN_COLOUR))

    return paint


def normal_colours(truth: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the painter of unit vectors (3, H, W), their coordinates as red, green and blue."""
    known = truth.any(axis=0)[..., None]

    def paint(vectors: np.ndarray) -> np.ndarray:
        colours = np.round(255 * (vectors.transpose(1, 2, 0) + 1) / 2).clip(0, 255).astype(np.uint8)
        return np.where(known, colours, np.uint8(HIDDEN_COLOUR))

    return paint
