"""Images as an evaluation sees them: decoded, fitted to one size, in batches."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from fastjepa.cores import usable_cores
from fastjepa.data.crops import fit_to
from fastjepa.data.decode_pillow import DecodeError
from fastjepa.data.pixels import Pixels, UnlikeError
from fastjepa.data.prepare.processes import console
from fastjepa.data.sources import Source
from fastjepa.errors import UserError, is_out_of_files
from fastjepa.evals.held_out import label_of
from fastjepa.loader.workers import Crew, Workers

Augmentation = Callable[[Tensor, int, tuple[int, int]], Tensor]  # (image, its row of the source, size) -> image of that size
FEW_IMAGES = 256  # images that are decoded sooner than processes start


class EvalImages(Dataset):
    """Images of a source as an evaluation sees them: (C, H, W) of the dtype that pixels have, one view each.

    Args:
        size: (H, W) the images are brought to.
        pixels: what becomes of the bytes of a file.
        rows: the images to take, in this order; default: all, in the source's order.
        augment: brings an image to `size`; default: it is resized and cropped as usual for evaluation.
        workers: decoding processes; default: none for few images and for pixels in memory, else up to 4.
    """

    def __init__(
        self,
        source: Source,
        size: tuple[int, int],
        pixels: Pixels,
        rows: np.ndarray | None = None,
        augment: Augmentation | None = None,
        workers: int | None = None,
    ):
        self.source, self.size, self.pixels, self.augment, self.workers = source, size, pixels, augment, workers
        self.rows = np.arange(len(source)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor | str:
        """Return the image, or the sentence that says what is wrong with it."""
        row = int(self.rows[i])
        try:
            image = self.pixels.decode(self.source.read(row)).image
            return self.augment(image, row, self.size) if self.augment else fit_to(image, self.size)
        except (DecodeError, UnlikeError, OSError) as error:
            if is_out_of_files(error):
                raise  # no fault of the file
            return f"{self.source.name(row)}: cannot be evaluated ({error}); repair or remove it"

    def labels(self) -> Tensor:
        """Return the classes, (n,) int64; UserError for an image without one."""
        found = [label_of(self.source, int(row)) for row in self.rows]
        if -1 in found:
            name = self.source.name(int(self.rows[found.index(-1)]))
            raise UserError(
                f"{name}: has no label, and probes need one of each image; put the images into class folders, or leave it out"
            )
        return torch.tensor(found, dtype=torch.int64)

    def batches(self, size: int, about: str = "features") -> Iterator[Tensor]:
        """Yield blocks (b, C, H, W) in order, with a progress bar on a terminal.

        OSError names a bad file, LoaderError what is wrong with the decoding processes.
        """
        workers = self.workers
        if workers is None:
            here = len(self) < FEW_IMAGES or isinstance(self.source.read(int(self.rows[0])), np.ndarray)
            workers = 0 if here else min(4, usable_cores())
        blocks = -(-len(self) // size)
        with contextlib.closing(Workers(_Blocks(self, size), range(blocks), Crew(workers))) as made:
            for block in watched(made, about, blocks):
                if isinstance(block, str):
                    raise OSError(block)
                yield block


def watched(items: Iterable, about: str, total: int | None = None) -> Iterable:
    """Return the same items, with a progress bar on a terminal that leaves nothing behind."""
    return track(items, about, total, console=console, transient=True, disable=not console.is_terminal)


class _Blocks(Dataset):
    """Blocks of images: of 10 images, block 2 of size 4 holds the last two."""

    def __init__(self, images: EvalImages, size: int):
        self.images, self.size = images, size

    def __getitem__(self, i: int) -> Tensor | str:
        """Return a block (b, C, H, W), or the sentence for the first image that is not readable."""
        rows = range(i * self.size, min((i + 1) * self.size, len(self.images)))
        items = [self.images[row] for row in rows]
        return next((item for item in items if isinstance(item, str)), None) or torch.stack(items)
