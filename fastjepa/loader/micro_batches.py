"""Micro-batches made of a source: which images, in which order, which crop of each, and what stands in for a bad file.

Every byte of a batch is a function of (recipe, rank, step, micro-batch), whatever the number of worker processes and
wherever a run was resumed.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastjepa.data.crops import BLOCKS_PER_SAMPLE, Box, Crops, crop_image
from fastjepa.data.decode_arrays import is_numpy_file
from fastjepa.data.decode_dali import Encoded, View, as_pnm, dali_reads
from fastjepa.data.decode_pillow import DecodeError, decode_file, read_header
from fastjepa.data.distortions import DISTORTION_BLOCKS, Distortions, distorted
from fastjepa.data.dropped import may_be_transparent
from fastjepa.data.pixels import Pixels, UnlikeError
from fastjepa.data.remote_shards import RemoteShards
from fastjepa.data.sources import Source
from fastjepa.errors import UserError, is_out_of_files
from fastjepa.loader.batch import Batch
from fastjepa.masks.layouts import Masking
from fastjepa.masks.packer import Packer
from fastjepa.masks.padding import padding_budget
from fastjepa.rng import BOX_STREAM, DISTORTION_STREAM, ORDER_STREAM, SUBSTITUTE_STREAM, generator

CropOf = Callable[[int, int], tuple[Box, bool]]  # (height, width) of an image -> box, whether to flip


@dataclass(frozen=True)
class BatchRecipe:
    """Recipe of a run's micro-batches: their sizes, crops, distortions and masks."""

    pixels: Pixels
    crops: Crops
    masking: Masking  # its seed is that of order and crops too
    batch_size: int  # images of a rank in a step
    micro_batch: int  # images of a forward
    max_bad: int  # undecodable files that a run may meet
    epochs: int  # of the run, over which the weight of visible patches rises
    padded: bool = False  # to one shape, for a CUDA graph
    token_budget: tuple[int, int, int] | None = None  # rows of that shape, where they are given
    distortions: Distortions = Distortions()


class Shown(NamedTuple):
    """One image of a batch, and what its file holds beside it."""

    image: Tensor | View  # a crop (C, H, W) as the network takes it, or the file that it is to be made of
    dropped: frozenset[str]  # kinds of `data.dropped`


class Found(NamedTuple):
    """The images of a batch, and what was met on the way to them."""

    images: Tensor | Encoded
    bad: dict[str, str]  # name -> reason
    dropped: list[tuple[str, str]]  # (name, kind), of the first epoch alone: in it a file is met once


class MicroBatches(Dataset):
    """The micro-batches of one rank, each a pure function of its number.

    Item step * n_micro + m is micro-batch m of that step: with 4 micro-batches a step, item 9 is number 1 of step 2.
    """

    def __init__(self, recipe: BatchRecipe, source: Source, rank: int, ranks: int):
        """Take the images of rank `rank` of `ranks`; each step shows batch_size * ranks of them."""
        self.recipe, self.source, self.rank = recipe, source, rank
        self.pixels, self.crops = recipe.pixels, recipe.crops
        self.packer, self.seed = Packer(recipe.masking), recipe.masking.seed
        self.total = recipe.batch_size * ranks
        self.n_micro = recipe.batch_size // recipe.micro_batch
        given = recipe.token_budget
        self.budget = padding_budget(recipe.masking, self.total, recipe.micro_batch, given) if recipe.padded else None
        self.steps_per_epoch = len(source) // self.total
        # However large max_bad is, a source without one readable image must stop the run.
        self.max_bad = min(recipe.max_bad, len(source) - 1)
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, item: int) -> Batch:
        return self._batch(item, self._decoded)

    def _batch(self, item: int, find: Callable[[int, list[int]], Found]) -> Batch:
        """Return a micro-batch; find(epoch, samples) gives its pixels or files."""
        step, micro = divmod(item, self.n_micro)
        batch_size, size = self.recipe.batch_size, self.recipe.micro_batch
        # Slots of the global batch: rank 1 with 64 images a rank, 16 a micro-batch, takes 64 + 32 to 64 + 48 for micro 2.
        start = self.rank * batch_size + micro * size
        samples = self.samples(step, start, start + size).tolist()
        if isinstance(self.source, RemoteShards):
            self.source.ahead(samples)
        images, bad, dropped = find(step // self.steps_per_epoch, samples)
        progress = step / max(1, self.steps_per_epoch * self.recipe.epochs)
        packed = self.packer.packed(step, range(start, start + size), self.total, batch_size, self.budget, progress)
        return Batch(images, *packed, bad=tuple(bad), reasons=tuple(bad.values()), dropped=tuple(dropped))

    @torch.inference_mode()  # saves a fifth of the time at 28 pixels
    def _decoded(self, epoch: int, samples: list[int]) -> Found:
        """Return (b, C, H, W) crops of the samples, distorted, as the network takes them."""
        images = torch.zeros(len(samples), self.pixels.channels, *self.crops.size, dtype=self.pixels.dtype)
        bad, dropped = {}, []
        for row, sample in zip(images, samples, strict=True):
            shown, unreadable = self._first_readable(epoch, sample, self._crop)
            bad |= unreadable
            if shown is None:
                break  # past max_bad: the loader stops the run on `bad`
            row.copy_(shown.image)
            dropped += self._dropped(epoch, sample, shown, unreadable)
        return Found(self._distorted(epoch, samples, images), bad, dropped)

    def _distorted(self, epoch: int, samples: list[int], crops: Tensor) -> Tensor:
        """Return the samples' crops (b, C, H, W) as they are distorted in this epoch."""
        drawn = self._distortion_draws(epoch, samples)
        return crops if drawn is None else distorted(crops, drawn)

    def _distortion_draws(self, epoch: int, samples: list[int]) -> Tensor | None:
        """Return the numbers (b, 13) by which the samples' crops are distorted in this epoch; None where no crop is.

        A substitute is distorted by the numbers of the sample that it stands in for.
        """
        if not (self.recipe.distortions.colour or self.recipe.distortions.blur):
            return None
        generators = [generator(self.seed, DISTORTION_STREAM, epoch, sample * DISTORTION_BLOCKS) for sample in samples]
        uniforms = [random.random(4 * DISTORTION_BLOCKS).tolist() for random in generators]
        return torch.tensor([self.recipe.distortions.draw(numbers) for numbers in uniforms])

    def _dropped(self, epoch: int, sample: int, shown: Shown, unreadable: dict[str, str]) -> list[tuple[str, str]]:
        """Return (name, kind) of what a sample's file holds beside its image: once, and not of a substitute."""
        return [(self.source.name(sample), kind) for kind in sorted(shown.dropped)] if epoch == 0 and not unreadable else []

    def samples(self, step: int, start: int, stop: int) -> np.ndarray:
        """Return the samples shown in slots start to stop of the step's global batch; each epoch is one permutation.

        With 10 samples and 4 slots a step, an epoch has 2 steps: step 3 is the second of epoch 1 and shows places 4 to 8 of
        its permutation; the last 2 samples are left out of that epoch.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, generator(self.seed, ORDER_STREAM, epoch).permutation(len(self.source))
        return self._order[1][within * self.total + start : within * self.total + stop]

    def view(self, epoch: int, sample: int) -> tuple[Tensor | None, dict[str, str]]:
        """Return the sample's crop in this epoch, distorted, (C, H, W), and {name: reason} of the bad files met.

        The crop is that of a substitute where the sample is bad, and None when more than `max_bad` candidates are.
        """
        shown, unreadable = self._first_readable(epoch, sample, self._crop)
        return (None if shown is None else self._distorted(epoch, [sample], shown.image[None])[0]), unreadable

    def _crop(self, raw: bytes | np.ndarray, crop_of: CropOf) -> Shown:
        """Return the crop of an image, (C, H, W) as the network takes it."""
        image, dropped, _ = self.pixels.decode(raw)
        box, flip = crop_of(*image.shape[1:])
        return Shown(self.pixels.ready(crop_image(image, box, self.crops.size, flip)), dropped)

    def _first_readable(
        self, epoch: int, sample: int, make: Callable[[bytes | np.ndarray, CropOf], Shown]
    ) -> tuple[Shown | None, dict[str, str]]:
        """Return make(bytes or pixels, crop_of) of the first candidate that can be read, and {name: reason} of those before it.

        A substitute is cropped by the numbers of the sample that it stands in for.
        """
        random = generator(self.seed, BOX_STREAM, epoch, sample * BLOCKS_PER_SAMPLE)
        uniforms = random.random(4 * BLOCKS_PER_SAMPLE).tolist()

        def crop_of(height: int, width: int) -> tuple[Box, bool]:
            return self.crops.draw(height, width, uniforms)

        unreadable: dict[int, tuple[str, str]] = {}  # candidate -> name and reason
        for candidate in self._candidates(epoch, sample):
            try:
                return make(self.source.read(candidate), crop_of), dict(unreadable.values())
            except UnlikeError as error:
                raise UserError(f"{self.source.name(candidate)}: {error}") from error
            except (DecodeError, OSError) as error:
                if is_out_of_files(error):
                    raise  # no fault of the file
                reason = getattr(error, "strerror", None) or str(error)
                unreadable[candidate] = self.source.name(candidate), reason
            if len(unreadable) > self.max_bad:
                return None, dict(unreadable.values())

    def _candidates(self, epoch: int, sample: int) -> Iterator[int]:
        """Yield the sample, then substitutes without end; each sample has 2**64 blocks of the stream to itself."""
        yield sample
        draws = generator(self.seed, SUBSTITUTE_STREAM, epoch, sample << 64)
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

    def _views(self, refused: Mapping[int, str], epoch: int, samples: list[int]) -> Found:
        """Return the views of the samples, those in the rows `refused` as pixels."""
        views, bad, dropped = [], {}, []
        as_file = functools.partial(self._file, first=epoch == 0)
        for row, sample in enumerate(samples):
            shown, unreadable = self._first_readable(epoch, sample, self._pixels if row in refused else as_file)
            if row in refused and not unreadable:
                said = "%s: Pillow decodes it, DALI cannot (%s)"
                logging.getLogger(__name__).warning(said, self.source.name(sample), refused[row])
            bad |= unreadable
            views.append(BLACK_PIXEL if shown is None else shown.image)
            if shown is None:
                break  # past max_bad: the loader stops the run on `bad`
            dropped += self._dropped(epoch, sample, shown, unreadable)
        return Found(Encoded.of(views, self._distortion_draws(epoch, samples[: len(views)])), bad, dropped)

    def _file(self, raw: bytes | np.ndarray, crop_of: CropOf, first: bool) -> Shown:
        """Return the view of a file as it is, or of its pixels where DALI would read others.

        DALI does not say whether alpha is opaque, of what it reads the one thing that is lost: in the first epoch Pillow does.
        """
        if isinstance(raw, bytes) and not is_numpy_file(raw):
            header = read_header(raw)
            if dali_reads(header, raw):
                ask = first and may_be_transparent(header.mode, header.info)
                dropped = decode_file(raw, self.pixels.channels).dropped if ask else frozenset()
                return Shown(View(raw, *crop_of(header.height, header.width)), dropped)
        return self._pixels(raw, crop_of)

    def _pixels(self, raw: bytes | np.ndarray, crop_of: CropOf) -> Shown:
        """Return the view of the pixels in the crop alone, decoded here; DALI resizes them."""
        image, dropped, _ = self.pixels.decode(raw)
        (top, left, height, width), flip = crop_of(*image.shape[1:])
        return Shown(View(as_pnm(image[:, top : top + height, left : left + width]), (0, 0, height, width), flip), dropped)


BLACK_PIXEL = View(as_pnm(torch.zeros(1, 1, 1, dtype=torch.uint8)), (0, 0, 1, 1), False)
