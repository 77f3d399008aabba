"""Fraction of a data set of image files, as a folder of links."""

from pathlib import Path

from fastjepa.data.image_folder import ImageFolder
from fastjepa.data.sources import open_source
from fastjepa.errors import UserError
from fastjepa.rng import SPLIT_STREAM, generator

SUBSET_DRAW = 1 << 34  # step of SPLIT_STREAM, which no evaluation uses


def subset_of(data: str, fraction: float, folder: Path) -> str:
    """Return `data`, or a folder below `folder` that links to a share of its training images, the same for every seed."""
    if fraction == 1:
        return data
    source = open_source(data, "train")
    if not isinstance(source, ImageFolder):
        raise UserError(f"{data}: a fraction of it can be taken of image files alone; pass --data DIR with a folder a class")
    count, root = max(1, round(fraction * len(source))), folder / "images"
    for i in generator(0, SPLIT_STREAM, SUBSET_DRAW).permutation(len(source))[:count].tolist():
        original = Path(source.name(i)).resolve()
        link = root / original.relative_to(Path(source.root).resolve())
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(original)
    return str(root)
