"""Arrays into pictures with numpy and Pillow: enlarged, grey or outlined patches, labelled sheets. All are (H, W, 3) uint8."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastjepa.errors import UserError
from fastjepa.files import atomic_path

HIDDEN_COLOUR = 200  # grey level of a patch that is not shown
PAPER_COLOUR, INK_COLOUR, OUTLINE_COLOUR = (255, 255, 255), (30, 30, 30), (230, 60, 30)
FONT_SIZE = 14  # pixels
TILE_SIDE = 112  # pixels that a small image is enlarged to at most, in whole times


def enlarged(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bring (b, h, w, 3) images to (b, *size, 3) by repeating pixels.

    Row r of H shows row r * h // H: of 2 rows brought to 4, rows 0 0 1 1.
    """
    row, column = (np.arange(wanted) * had // wanted for wanted, had in zip(size, images.shape[1:3], strict=True))
    return images[:, row[:, None], column]


def zoomed(image: np.ndarray, side: int = TILE_SIDE) -> np.ndarray:
    """Enlarge (h, w, 3) a whole number of times, as long as the longer side stays within `side`; each pixel a square."""
    times = max(1, side // max(image.shape[:2]))
    return image.repeat(times, axis=0).repeat(times, axis=1)


def hidden_patches(image: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Return the image with its patches grey where `shown` (rows, columns) bool is False."""
    return np.where(enlarged(shown[None, ..., None], image.shape[:2])[0], image, np.uint8(HIDDEN_COLOUR))


def outlined_block(image: np.ndarray, block: np.ndarray, width: int = 2) -> np.ndarray:
    """Return the image with a line `width` pixels wide around the patches of `block` (rows, columns) bool, within them."""
    inside = enlarged(block[None, ..., None], image.shape[:2])[0, ..., 0]
    padded = np.pad(inside, width)
    # A pixel is at the edge where a pixel at most `width` away, in the square window around it, is outside the block.
    window = np.lib.stride_tricks.sliding_window_view(padded, (2 * width + 1,) * 2)  # (H, W, 2 width + 1, 2 width + 1)
    edge = inside & ~window.all(axis=(2, 3))
    return np.where(edge[..., None], np.array(OUTLINE_COLOUR, np.uint8), image)


def captioned(image: np.ndarray, text: str) -> np.ndarray:
    """Return the image with a line of text below it; it is widened where the text is longer."""
    font = ImageFont.load_default(FONT_SIZE)
    height, width = image.shape[:2]
    paper = Image.new("RGB", (max(width, _text_width(text, font)), height + _text_height([text], font)), PAPER_COLOUR)
    paper.paste(Image.fromarray(image), (0, 0))
    ImageDraw.Draw(paper).text((0, height + 2), text, INK_COLOUR, font, anchor="la")
    return np.asarray(paper)


def masks_sheet(
    images: Sequence[np.ndarray], context_mask: np.ndarray, target_mask: np.ndarray, grid: tuple[int, int]
) -> np.ndarray:
    """Return a sheet with a row for each image: the image, its contexts, its target blocks; hidden patches are grey.

    Args:
        images: b of (H, W, 3) uint8.
        context_mask: (b, K, N) bool, as `draw_masks` returns it.
        target_mask: (b, R, N) bool.
        grid: (rows, columns) of patches; UserError where they are not N.
    """
    if grid[0] * grid[1] != context_mask.shape[-1]:
        raise UserError(
            f"masks of {context_mask.shape[-1]} patches do not fill a grid of {grid[0]}x{grid[1]}; draw them for that grid"
        )
    whole = np.ones_like(context_mask[:, :1])
    shown = np.concatenate([whole, context_mask, target_mask], axis=1)  # (b, 1 + K + R, N)
    rows = [[zoomed(hidden_patches(image, mask.reshape(grid))) for mask in masks]
            for image, masks in zip(images, shown, strict=True)]  # fmt: skip
    contexts, targets = numbered("context", context_mask.shape[1]), numbered("target", target_mask.shape[1])
    return picture_sheet(rows, headings=["image", *contexts, *targets])


def numbered(name: str, count: int) -> list[str]:
    """Return the headings of `count` columns: "name 1", "name 2" ...; of a single one the name alone."""
    return [name] if count == 1 else [f"{name} {i + 1}" for i in range(count)]


def picture_sheet(
    rows: list[list[np.ndarray]], gap: int = 4, labels: list[str] | None = None, headings: list[str] | None = None
) -> np.ndarray:
    """Return a table of images on white, each at the top left of its cell; rows may differ in length, images in size.

    Args:
        rows: (h, w, 3) uint8 images of each row.
        gap: white pixels between cells.
        labels: one a row, left of it.
        headings: one a column, above it; columns are widened for them.
    """
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"{len(labels)} labels for {len(rows)} rows")
    font = ImageFont.load_default(FONT_SIZE)
    heights = [max((image.shape[0] for image in row), default=0) for row in rows]
    columns = max(map(len, rows), default=0)
    headings = [*(headings or []), *[""] * columns][:columns]
    widths = [max([row[i].shape[1] for row in rows if len(row) > i] + [_text_width(headings[i], font)]) for i in range(columns)]
    left = max(map(lambda text: _text_width(text, font), labels or []), default=0) + (gap if labels else 0)
    top = _text_height(headings, font) + (gap if any(headings) else 0)
    xs, ys = _starts(widths, gap, left), _starts(heights, gap, top)
    paper = Image.new("RGB", (max(xs[-1] - gap, 1), max(ys[-1] - gap, 1)), PAPER_COLOUR)
    draw = ImageDraw.Draw(paper)
    for y, height, row, label in zip(ys, heights, rows, labels or [""] * len(rows), strict=False):
        draw.text((0, y + height / 2), label, INK_COLOUR, font, anchor="lm")
        for x, image in zip(xs, row, strict=False):
            paper.paste(Image.fromarray(np.ascontiguousarray(image)), (x, y))
    for x, text in zip(xs, headings, strict=False):
        draw.text((x, 0), text, INK_COLOUR, font, anchor="la")
    return np.asarray(paper)


def _starts(lengths: list[int], gap: int, first: int) -> list[int]:
    """Return where each cell starts, and where one more would: lengths 10, 20 with gap 4 from 3 give 3, 17, 41."""
    return [first, *(first + np.cumsum([length + gap for length in lengths], dtype=int)).tolist()]


def _text_width(text: str, font) -> int:
    """Return the width of the widest line in whole pixels, with room for a letter that leans out of it."""
    return max(int(font.getlength(line)) + 3 for line in text.split("\n")) if text else 0


def _text_height(texts: list[str], font) -> int:
    """Return the height in pixels of the text with the most lines."""
    lines = max((text.count("\n") + 1 for text in texts if text), default=0)
    return lines * (sum(font.getmetrics()) + 4)


def save_picture(image: np.ndarray, path: Path) -> None:
    """Write an image as PNG, whatever the path ends with; the file is there whole or not at all."""
    with atomic_path(path) as hidden:
        Image.fromarray(image).save(hidden, "PNG")
