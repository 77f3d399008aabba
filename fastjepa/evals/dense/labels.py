"""Pictures with a label image each: which files belong together, and their pixels."""

from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from fastjepa.data.decode_arrays import is_numpy_file
from fastjepa.data.decode_pillow import DecodeError, read_header
from fastjepa.data.image_folder import ImageFolder
from fastjepa.data.pixels import Pixels, UnlikeError
from fastjepa.data.prepare.catalog import DATASETS, find_dataset
from fastjepa.errors import UserError
from fastjepa.evals.dense.tasks import DenseTask
from fastjepa.evals.images import watched
from fastjepa.evals.inputs import Split

SCENE_KINDS = {"segmentation": ("shape", "material", "object"), "depth": ("depth",), "normals": ("normal",)}
GREY_MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # Pillow's names of what holds one number a pixel


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures and their label images: a source, as fastjepa/data/sources.py describes it, without classes of images."""

    pictures: tuple[Path, ...]
    label_files: tuple[Path, ...]  # one a picture
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, i: int) -> str:
        """Return the path of picture i."""
        return str(self.pictures[i])

    def read(self, i: int) -> bytes:
        """Return the encoded bytes of picture i."""
        return self.pictures[i].read_bytes()

    def label(self, i: int) -> None:
        """Return None: a picture as a whole has no class."""
        del i


def rendered_pictures(data: str, kind: str, split: str) -> LabelledPictures:
    """Return the pictures of a rendered data set with their labels of a kind.

    They lie at ROOT/images/SPLIT/NAME.png or ROOT/SPLIT/NAME.png, their labels at ROOT/labels/KIND/SPLIT/NAME.png.
    """
    root = find_dataset(data) if data in DATASETS else Path(data).expanduser()
    folder = next((folder for folder in (root / "images" / split, root / split) if folder.is_dir()), None)
    labels = root / "labels" / kind / split
    if folder is None:
        raise UserError(f"{root / 'images' / split}: no such directory; give scenes, scenes-128, or --images and --labels")
    if not labels.is_dir():
        again = f"delete {root} and run: fastjepa data get {data}" if data in DATASETS else "or give --images and --labels"
        raise UserError(f"{labels}: no such directory, so the pictures have no labels of this kind; {again}")
    return paired_pictures(folder, labels)


def paired_pictures(images: Path, labels: Path, listing: Path | None = None) -> LabelledPictures:
    """Return the pictures below a folder with the label images that have their names, endings aside.

    Args:
        listing: a file that names the pictures to take, one a line, as VOC's ImageSets/Segmentation/train.txt; without it
            every picture must have a label image.
    """
    pictures, label_files = _by_stem(images), _by_stem(labels)
    stems = list(pictures) if listing is None else _listed_stems(listing)
    for stem in stems:
        if stem not in pictures:
            raise UserError(f"{listing}: names {stem}, and {images} has no such picture; mend the list or add the file")
        if stem not in label_files:
            said = f"{pictures[stem]}: has no label image ({labels / stem}.png)"
            raise UserError(f"{said}; add it, or name the pictures that have one with --lists")  # fmt: skip
    return LabelledPictures(tuple(pictures[stem] for stem in stems), tuple(label_files[stem] for stem in stems))


def _by_stem(folder: Path) -> dict[str, Path]:
    """Return {path below the folder, without its ending: path} of the images of a folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory; name folders of pictures and of label images")
    found = ImageFolder(folder)
    paths = [Path(found.name(i)) for i in range(len(found))]
    return {str(path.relative_to(folder).with_suffix("")): path for path in paths}


def _listed_stems(listing: Path) -> list[str]:
    try:
        lines = listing.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{listing}: cannot be read as a list of names ({error}); give a text file, a name a line") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UserError(f"{listing}: names no picture; give a text file, a name a line")
    endings = (".png", ".jpg", ".jpeg")
    return [str(PurePath(name).with_suffix("")) if name.lower().endswith(endings) else name for name in names]


def read_labels(split: Split, task: DenseTask, pixels: Pixels) -> list[np.ndarray]:
    """Return the label images of a split as they are stored, in their own sizes, checked; all are held in memory."""
    source, found = split.source, []
    for row in watched(split.rows.tolist(), f"{split.name} labels", len(split.rows)):
        file = source.label_files[row]
        stored = read_label(file, task.bands)
        height, width = picture_size(source, row, pixels)
        if stored.shape[:2] != (height, width):
            raise UserError(f"{file}: is of {stored.shape[1]}x{stored.shape[0]} pixels, and {source.name(row)} of "
                            f"{width}x{height}; a label image has the size of its picture")  # fmt: skip
        task.check(stored, file)
        found.append(stored)
    return found


def picture_size(source: LabelledPictures, row: int, pixels: Pixels) -> tuple[int, int]:
    """Return (H, W) of a picture as it is decoded; arrays have no header that all their formats share."""
    raw = source.read(row)
    if pixels.are_pictures and not is_numpy_file(raw):
        header = read_header(raw)
        return header.height, header.width
    try:
        return tuple(pixels.decode(raw).image.shape[1:])
    except (DecodeError, UnlikeError) as error:
        raise UserError(f"{source.name(row)}: {error}") from error


def read_label(file: Path, bands: int) -> np.ndarray:
    """Return a label image (H, W) of one number a pixel, for 3 bands (H, W, 3): a palette's numbers, not its colours."""
    wanted, modes = ("8-bit RGB", ("RGB",)) if bands == 3 else ("one number a pixel: grey, or a palette", GREY_MODES)
    try:
        with Image.open(file) as image:
            if image.format == "JPEG":
                raise UserError(f"{file}: a JPEG blends labels at their edges; store label images as PNG")
            if image.mode not in modes:
                raise UserError(f"{file}: holds {image.mode} pixels, and label images of this task are {wanted}; convert it")
            return np.array(image, np.uint8 if image.mode == "1" else None)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: cannot be read as a label image ({error}); repair it") from error


def fitted_labels(stored: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Return label images brought to one size, (n, *size) or (n, *size, 3), without blending: row r of H shows the row of h
    whose pixel holds the centre of its own, (2 r + 1) h // (2 H).
    """

    def fitted(image: np.ndarray) -> np.ndarray:
        rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, image.shape, strict=False))
        return image[rows[:, None], columns]

    return np.stack([fitted(image) for image in stored])
