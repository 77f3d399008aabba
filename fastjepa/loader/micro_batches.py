"""Micro-batches made of a source: which images, in which order, which crop of each, and what stands in for a bad file.

Every byte of a batch is a function of (config, rank, step, micro-batch), whatever the number of worker processes and
wherever a run was resumed.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastjepa.config.schema import Config
from fastjepa.data.crops import BLOCKS_PER_SAMPLE, CROP_TRIES, Box, crop_box, crop_image
from fastjepa.data.decode_dali import Encoded, View, as_pnm, dali_reads
from fastjepa.data.decode_pillow import DecodeError, decode_image, read_header
from fastjepa.data.remote_shards import RemoteShards
from fastjepa.data.sources import Source
from fastjepa.loader.batch import Batch
from fastjepa.masks.packer import packer_of
from fastjepa.masks.padding import padding_budget
from fastjepa.rng import BOX_STREAM, ORDER_STREAM, SUBSTITUTE_STREAM, generator

Shown = TypeVar("Shown")  # what one image becomes: a Tensor, or a View
CropOf = Callable[[int, int], tuple[Box, bool]]  # (height, width) of an image -> box, whether to flip


class MicroBatches(Dataset):
    """The micro-batches of one rank, each a pure function of its number.

    Item step * n_micro + m is micro-batch m of that step: with 4 micro-batches a step, item 9 is number 1 of step 2.
    """

    def __init__(self, config: Config, source: Source, rank: int, ranks: int):
        """Take the images of rank `rank` of `ranks`; each step shows data.batch_size * ranks of them."""
        self.config, self.source, self.rank = config, source, rank
        self.total = config.data.batch_size * ranks
        self.n_micro = config.data.batch_size // config.micro_batch
        self.packer = packer_of(config)
        self.budget = padding_budget(config, self.total) if config.runtime.cuda_graph else None
        self.steps_per_epoch = len(source) // self.total
        # However large max_bad is, a source without one readable image must stop the run.
        self.max_bad = min(config.data.max_bad, len(source) - 1)
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, item: int) -> Batch:
        return self._batch(item, self._decoded)

    def _batch(self, item: int, images: Callable[[int, list[int]], tuple[Tensor | Encoded, list[str]]]) -> Batch:
        """Return a micro-batch; images(epoch, samples) gives its pixels or files, and the names of the bad ones."""
        step, micro = divmod(item, self.n_micro)
        data, size = self.config.data, self.config.micro_batch
        # Slots of the global batch: rank 1 with 64 images a rank, 16 a micro-batch, takes 64 + 32 to 64 + 48 for micro 2.
        start = self.rank * data.batch_size + micro * size
        samples = self.samples(step, start, start + size).tolist()
        if isinstance(self.source, RemoteShards):
            self.source.ahead(samples)
        shown, bad = images(step // self.steps_per_epoch, samples)
        slots = range(start, start + size)
        progress = step / max(1, self.steps_per_epoch * self.config.optimization.epochs)
        packed = self.packer.packed(step, slots, self.total, data.batch_size, self.budget, progress)
        return Batch(shown, *packed, bad=tuple(bad), reasons=tuple(bad.values()))

    @torch.inference_mode()  # saves a fifth of the time at 28 pixels
    def _decoded(self, epoch: int, samples: list[int]) -> tuple[Tensor, dict[str, str]]:
        """Return (b, C, H, W) uint8 crops of the samples, and {name: reason} of the bad files met."""
        images = torch.zeros(len(samples), self.config.data.channels, *self.config.image_size, dtype=torch.uint8)
        bad: dict[str, str] = {}
        for row, sample in zip(images, samples, strict=True):
            image, unreadable = self.view(epoch, sample)
            bad |= unreadable
            if image is None:
                break  # past max_bad: the loader stops the run on `bad`
            row.copy_(image)
        return images, bad

    def samples(self, step: int, start: int, stop: int) -> np.ndarray:
        """Return the samples shown in slots start to stop of the step's global batch; each epoch is one permutation.

        With 10 samples and 4 slots a step, an epoch has 2 steps: step 3 is the second of epoch 1 and shows places 4 to 8 of
        its permutation; the last 2 samples are left out of that epoch.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, generator(self.config.runtime.seed, ORDER_STREAM, epoch).permutation(len(self.source))
        return self._order[1][within * self.total + start : within * self.total + stop]

    def view(self, epoch: int, sample: int) -> tuple[Tensor | None, dict[str, str]]:
        """Return the sample's crop in this epoch, (C, H, W) uint8, and {name: reason} of the bad files met.

        The crop is that of a substitute where the sample is bad, and None when more than `max_bad` candidates are.
        """

        def make(raw: bytes | np.ndarray, crop_of: CropOf) -> Tensor:
            image = decode_image(raw, self.config.data.channels)
            box, flip = crop_of(*image.shape[1:])
            return crop_image(image, box, self.config.image_size, flip)

        return self._first_readable(epoch, sample, make)

    def _first_readable(
        self, epoch: int, sample: int, make: Callable[[bytes | np.ndarray, CropOf], Shown]
    ) -> tuple[Shown | None, dict[str, str]]:
        """Return make(bytes or pixels, crop_of) of the first candidate that can be read, and {name: reason} of those before it.

        A substitute is cropped by the numbers of the sample that it stands in for.
        """
        data = self.config.data
        random = generator(self.config.runtime.seed, BOX_STREAM, epoch, sample * BLOCKS_PER_SAMPLE)
        uniforms = random.random(4 * BLOCKS_PER_SAMPLE).tolist()

        def crop_of(height: int, width: int) -> tuple[Box, bool]:
            flip = data.use_horizontal_flip and uniforms[4 * CROP_TRIES] < 0.5
            return crop_box(height, width, data.crop_scale, uniforms), flip

        unreadable: dict[int, tuple[str, str]] = {}  # candidate -> name and reason
        for candidate in self._candidates(epoch, sample):
            try:
                return make(self.source.read(candidate), crop_of), dict(unreadable.values())
            except (DecodeError, OSError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                unreadable[candidate] = self.source.name(candidate), reason
            if len(unreadable) > self.max_bad:
                return None, dict(unreadable.values())

    def _candidates(self, epoch: int, sample: int) -> Iterator[int]:
        """Yield the sample, then substitutes without end; each sample has 2**64 blocks of the stream to itself."""
        yield sample
        draws = generator(self.config.runtime.seed, SUBSTITUTE_STREAM, epoch, sample << 64)
        while True:
            yield int(draws.random() * len(self.source))


class EncodedBatches(MicroBatches):
    """The same micro-batches with their images still to be decoded, by DALI: `images` is Encoded."""

    def __getitem__(self, item: int) -> Batch:
        return self.without(item, {})

    def without(self, item: int, refused: Mapping[int, str]) -> Batch:
        """Return micro-batch `item` when DALI refuses the files in some rows, for the reasons given.

        Those rows become the pixels that Pillow reads, of the sample or of a substitute: DALI takes any. The others do not
        change.
        """
        return self._batch(item, functools.partial(self._views, refused))

    def _views(self, refused: Mapping[int, str], epoch: int, samples: list[int]) -> tuple[Encoded, dict[str, str]]:
        """Return the views of the samples, those in the rows `refused` as pixels, and {name: reason} of the bad files met."""
        views, bad = [], {}
        for row, sample in enumerate(samples):
            view, unreadable = self._first_readable(epoch, sample, self._pixels if row in refused else self._file)
            if row in refused and not unreadable:
                said = "%s: Pillow decodes it, DALI cannot (%s)"
                logging.getLogger(__name__).warning(said, self.source.name(sample), refused[row])
            bad |= unreadable
            views.append(view or BLACK_PIXEL)  # past max_bad: the loader stops the run on `bad`
            if view is None:
                break
        return Encoded.of(views), bad

    def _file(self, raw: bytes | np.ndarray, crop_of: CropOf) -> View:
        """Return the view of a file as it is, or of its pixels where DALI would read others."""
        if isinstance(raw, bytes):
            header = read_header(raw)
            if dali_reads(header, raw):
                return View(raw, *crop_of(header.height, header.width))
        return self._pixels(raw, crop_of)

    def _pixels(self, raw: bytes | np.ndarray, crop_of: CropOf) -> View:
        """Return the view of the pixels in the crop alone, decoded by Pillow; DALI resizes them."""
        image = decode_image(raw, self.config.data.channels)
        (top, left, height, width), flip = crop_of(*image.shape[1:])
        return View(as_pnm(image[:, top : top + height, left : left + width]), (0, 0, height, width), flip)


BLACK_PIXEL = View(as_pnm(torch.zeros(1, 1, 1, dtype=torch.uint8)), (0, 0, 1, 1), False)
