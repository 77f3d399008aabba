"""Rendered scenes beside the labels of their pixels, as a sheet: `python docs/scene_labels.py PICTURE.png`."""

import sys
from pathlib import Path

import numpy as np

from fastjepa.data.prepare.scenes import COLOURS, draw_scene, label_scene, render_scene
from fastjepa.visualize.images import picture_sheet, save_picture, zoomed

SCENES, SIZE, SHOWN = (3, 6, 12), 64, 192  # of the train split; pixels of a picture; pixels that it is drawn with
PLANE = (40, 40, 40)
# Of numbers from 0 to 10, the most objects of a scene.
PALETTE = np.array([PLANE, *list(COLOURS.values())[1:], (255, 140, 0), (255, 255, 255), (90, 160, 120)], np.uint8)


def row(number: int) -> list[np.ndarray]:
    """Return the picture of a scene, then its labels as pictures (SIZE, SIZE, 3): near is light, numbers are colours."""
    scene = draw_scene(0, "train", number)
    labels = label_scene(scene, SIZE)
    depth = labels["depth"].astype(float)
    near = 255 - 215 * (depth - depth.min()) / (depth.max() - depth.min())
    coloured = [PALETTE[labels[kind]] for kind in ("object", "shape", "material")]
    return [render_scene(scene, SIZE), near.astype(np.uint8)[..., None].repeat(3, axis=2), *coloured, labels["normal"]]


def sheet() -> np.ndarray:
    """Return the sheet, a row for each scene."""
    rows = [[zoomed(image, SHOWN) for image in row(number)] for number in SCENES]
    return picture_sheet(rows, headings=["picture", "depth", "object", "shape", "material", "normal"])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    save_picture(sheet(), Path(sys.argv[1]))
