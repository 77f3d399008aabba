"""Arrays into pictures: principal components as colours, outlined blocks, labelled sheets. All are (H, W, 3) uint8."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastjepa.errors import ConfigError

HIDDEN_COLOUR = 200  # grey level of a patch that is not shown, as in masks.picture
PAPER_COLOUR, INK_COLOUR, OUTLINE_COLOUR = (255, 255, 255), (30, 30, 30), (230, 60, 30)
FONT_SIZE = 14  # pixels
CLIPPED_SHARE = 0.01  # share of patches beyond either end of a component's colours


def to_uint8(images: Tensor, mean_std: tuple[Sequence[float], Sequence[float]] | None = None) -> np.ndarray:
    """(b, C, H, W), C 1 or 3 -> (b, H, W, 3): uint8 as it is; floats, normalised with `mean_std`, brought back and clipped."""
    if images.dtype != torch.uint8:
        mean, std = (torch.tensor(values)[:, None, None] for values in mean_std or ((0.0,), (1.0,)))
        images = ((images.float().cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return images.cpu().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()


def principal_components(x: Tensor, count: int = 3) -> Tensor:
    """(n, D) -> (n, count) fp64: coordinates along the axes of largest variance, the largest first; zeros beyond D axes.

    An axis points to where its entry of largest magnitude is positive, as scikit-learn's does: the same input gives the
    same signs.
    """
    x = x.double().cpu()
    x = x - x.mean(dim=0)
    _, axes = torch.linalg.eigh(x.T @ x)  # columns, rising
    axes = axes.flip(1)[:, :count]
    signs = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    found = x @ (axes * signs)
    return torch.nn.functional.pad(found, (0, count - found.shape[1]))


def pca_picture(
    features: Tensor, grid: tuple[int, int], size: tuple[int, int], mask: Tensor | np.ndarray | None = None
) -> np.ndarray:
    """The first three principal components of patch features as red, green and blue.

    Args:
        features: (b, N, D), any float dtype; the components are those of all patches of all images together.
        grid: (rows, columns), N of them.
        size: (H, W) of the pictures; patches are enlarged as squares, not blended.
        mask: (b, N) bool, the patches that count; the others are grey. Default: all.

    Returns:
        (b, H, W, 3) uint8. Each component is stretched between its 1st and 99th percentile; one that does not vary is
        mid grey. Colours of two calls mean different things.
    """
    b, n, _ = features.shape
    if grid[0] * grid[1] != n:
        raise ConfigError(f"features of {n} patches do not fill a grid of {grid[0]}x{grid[1]}; give the grid they were made on")
    shown = torch.ones(b, n, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    colours = torch.full((b, n, 3), HIDDEN_COLOUR, dtype=torch.uint8)
    if shown.any():
        colours[shown] = _stretched(principal_components(features.cpu()[shown]))
    return _enlarged(colours.view(b, *grid, 3).numpy(), size)


def _stretched(values: Tensor) -> Tensor:
    """(n, 3) -> uint8, each column between its own percentiles."""
    low, high = torch.quantile(values, torch.tensor([CLIPPED_SHARE, 1 - CLIPPED_SHARE], dtype=values.dtype), dim=0)
    span = high - low
    flat = span <= 1e-9 * span.max()
    share = torch.where(flat, 0.5, (values - low) / torch.where(flat, 1.0, span))
    return (share.clamp(0, 1) * 255).round().to(torch.uint8)


def _enlarged(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(b, h, w, 3) -> (b, *size, 3), nearest."""
    row, column = (np.arange(wanted) * had // wanted for wanted, had in zip(size, images.shape[1:3], strict=True))
    return images[:, row[:, None], column]


def zoomed(image: np.ndarray, side: int) -> np.ndarray:
    """(h, w, 3) enlarged a whole number of times, as long as its longer side stays within `side`; each pixel a square."""
    times = max(1, side // max(image.shape[:2]))
    return image.repeat(times, axis=0).repeat(times, axis=1)


def hidden_patches(image: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """(H, W, 3) with its patches where `shown` (rows, cols) is False in grey."""
    return np.where(_enlarged(shown[None, ..., None], image.shape[:2])[0], image, np.uint8(HIDDEN_COLOUR))


def outlined_block(image: np.ndarray, block: np.ndarray, width: int = 2) -> np.ndarray:
    """(H, W, 3) with a line `width` pixels wide around the patches of `block` (rows, cols) bool, within them."""
    inside = _enlarged(block[None, ..., None], image.shape[:2])[0, ..., 0]
    padded = np.pad(inside, width)
    window = np.lib.stride_tricks.sliding_window_view(padded, (2 * width + 1,) * 2)
    edge = inside & ~window.all(axis=(2, 3))
    return np.where(edge[..., None], np.array(OUTLINE_COLOUR, np.uint8), image)


def captioned(image: np.ndarray, text: str) -> np.ndarray:
    """The image with a line of text below it; widened where the text is longer."""
    font = ImageFont.load_default(FONT_SIZE)
    height, width = image.shape[:2]
    paper = Image.new("RGB", (max(width, _text_width(text, font)), height + _text_height([text], font)), PAPER_COLOUR)
    paper.paste(Image.fromarray(image), (0, 0))
    ImageDraw.Draw(paper).text((0, height + 2), text, INK_COLOUR, font, anchor="la")
    return np.asarray(paper)


def picture_sheet(
    rows: list[list[np.ndarray]], gap: int = 4, labels: list[str] | None = None, headings: list[str] | None = None
) -> np.ndarray:
    """A table of images, (h, w, 3) uint8 each at its cell's top left, on white; rows may differ in length, images in size.

    Args:
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
    """Where each cell starts, and where one more would."""
    return [first, *(first + np.cumsum([length + gap for length in lengths], dtype=int)).tolist()]


def _text_width(text: str, font) -> int:
    """Of the widest line, in whole pixels, with room for what leans out of it."""
    return max(int(font.getlength(line)) + 3 for line in text.split("\n")) if text else 0


def _text_height(texts: list[str], font) -> int:
    lines = max((text.count("\n") + 1 for text in texts if text), default=0)
    return lines * (sum(font.getmetrics()) + 4)


def save_picture(image: np.ndarray, path: Path) -> None:
    """As PNG, there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}")
    Image.fromarray(image).save(hidden, "PNG")
    hidden.replace(path)
