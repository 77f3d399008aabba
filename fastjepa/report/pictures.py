"""Pictures of a run for its page: those in its directory, and masks and principal components drawn anew."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fastjepa.errors import UserError
from fastjepa.report.recorded_run import RecordedRun

REPORT_IMAGES = 6  # images in a picture that is drawn anew
PICTURE_CAPTIONS = {  # {file stem: (title, sentence)}
    "masks": ("Masks over images", "Each row an image: whole, what the context encoder sees, and the blocks to predict."),
    "pca": ("Principal components of patch features", "The first three as red, green and blue, for each encoder."),
    "neighbours": (
        "Nearest neighbours of predictions",
        "Blocks of other images nearest to what is predicted of a hidden one.",
    ),
    "dense-segmentation": ("Classes of pixels", "Pictures, the truth, and what k-NN and a linear layer say of patch features."),
    "dense-depth": ("Depth of pixels", "Near is bright; k-NN and a linear layer on patch features beside the truth."),
    "dense-normals": ("Normals of pixels", "Coordinates as colours; k-NN and a linear layer beside the truth."),
    "samples": ("Samples of the predictor", "What a diffusion decoder draws from a prediction, beside the truth."),
}


def gather_pictures(run: RecordedRun, bands: Sequence[int] | None = None) -> tuple[list[dict[str, str]], str | None]:
    """Return {title, words, source} of each picture, and why some are missing.

    Those in RUN/pictures are taken as they are. Masks and principal components that are not there are drawn from the latest
    checkpoint, over images shown by `bands`.
    """
    found = {file.stem: file.read_bytes() for file in sorted((run.path / "pictures").glob("*.png"))}
    missing = None
    if not {"masks", "pca"} <= found.keys():
        try:
            if run.checkpoint is None:
                raise UserError("no checkpoint was written yet")
            found = draw_pictures(run.checkpoint, bands) | found
        except (UserError, OSError) as error:
            missing = str(error)
    stems = [*(stem for stem in PICTURE_CAPTIONS if stem in found), *sorted(found.keys() - PICTURE_CAPTIONS.keys())]
    return [picture_entry(stem, found[stem]) for stem in stems], missing


def picture_entry(stem: str, content: bytes) -> dict[str, str]:
    """Return what the page needs of a picture; its PNG becomes a data URI."""
    title, words = PICTURE_CAPTIONS.get(stem, (stem, f"pictures/{stem}.png"))
    return {"title": title, "words": words, "source": f"data:image/png;base64,{base64.b64encode(content).decode()}"}


def draw_pictures(checkpoint: Path, bands: Sequence[int] | None = None) -> dict[str, bytes]:
    """Draw masks and principal components of some of the run's own images, as PNG; on the CPU, which the run can spare."""
    from fastjepa.evals.inputs import open_subject
    from fastjepa.visualize.bands import ShownBands
    from fastjepa.visualize.sheets import drawn_masks_sheet, open_drawn_split, pca_sheet, shown_images

    subject = open_subject(checkpoint, "cpu", cache=False)
    split = open_drawn_split(subject.config.data.address, "train", REPORT_IMAGES, subject.config.runtime.seed)
    shown = shown_images(subject, split, len(split.rows))
    chosen = ShownBands.of(subject.pixels, bands)
    masks = drawn_masks_sheet(subject, shown, subject.config.runtime.seed, chosen)
    return {"masks": png_bytes(masks), "pca": png_bytes(pca_sheet(subject, shown, chosen))}


def png_bytes(image: np.ndarray) -> bytes:
    """Return an image (H, W, 3) uint8 as PNG."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", optimize=True)
    return out.getvalue()
