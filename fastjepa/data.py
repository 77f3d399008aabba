"""Images from a source to the device. The loader alone decides order, boxes and substitutes.

Every byte of a batch is a function of (config, rank, step, micro-batch), whatever the number of worker processes and
wherever a run was resumed.
"""

import atexit
import functools
import itertools
import logging
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastjepa import budget, decode_dali, decode_torch, masks
from fastjepa.config import Config, ConfigError
from fastjepa.decode_dali import Encoded, View
from fastjepa.decode_torch import Box, DecodeError, crop, decode
from fastjepa.draws import BOXES, ORDER, SUBSTITUTES, generator
from fastjepa.packing import Blocks, Movable, Packed, pack
from fastjepa.remote_shards import RemoteShards
from fastjepa.sources import IdxPair, Source

log = logging.getLogger(__name__)

ASPECT = (3 / 4, 4 / 3)  # width / height of a crop
TRIES = 10  # boxes tried before the central crop
BLOCKS_PER_SAMPLE = TRIES + 1  # four doubles a try, and one block for the flip


def crop_box(height: int, width: int, scale: tuple[float, float], uniforms: Sequence[float]) -> Box:
    """torchvision's RandomResizedCrop.get_params on given numbers: (top, left, height, width) in pixels.

    `uniforms`: 4 * TRIES numbers in [0, 1), area, aspect, top and left of each try; when none fits, the central crop.
    """
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    for t in range(0, 4 * TRIES, 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniforms[t])
        aspect = math.exp(low + (high - low) * uniforms[t + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(uniforms[t + 2] * (height - h + 1)), int(uniforms[t + 3] * (width - w + 1)), h, w
    h = min(height, round(width / ASPECT[0]))
    w = min(width, round(height * ASPECT[1]))
    return (height - h) // 2, (width - w) // 2, h, w


T = TypeVar("T")
CropOf = Callable[[int, int], tuple[Box, bool]]  # (height, width) of an image -> box, whether to flip


@dataclass(frozen=True)
class Batch(Movable):
    """A micro-batch of b images and their masks."""

    images: Tensor | Encoded  # (b, C, H, W) uint8, or the files it is to be made of
    context: Packed  # K*b sequences of context patches
    target: Packed  # b sequences, the union of each image's target blocks
    blocks: Blocks
    bad: tuple[str, ...]  # files replaced in this micro-batch


class MicroBatches(Dataset):
    """Item step * n_micro + m is micro-batch m of that step on this rank: a pure function of its number."""

    def __init__(self, config: Config, source: Source, rank: int, world: int):
        self.config, self.source, self.rank = config, source, rank
        self.total = config.data.batch_size * world
        self.n_micro = config.data.batch_size // config.micro_batch
        self.budget = budget.of(config, self.total) if config.runtime.cuda_graph else None
        self.steps_per_epoch = len(source) // self.total
        # However large max_bad is, a source without one readable image must stop the run.
        self.max_bad = min(config.data.max_bad, len(source) - 1)
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, item: int) -> Batch:
        return self._batch(item, self._decoded)

    def _batch(self, item: int, images: Callable[[int, list[int]], tuple[Tensor | Encoded, list[str]]]) -> Batch:
        step, micro = divmod(item, self.n_micro)
        data, size = self.config.data, self.config.micro_batch
        start = self.rank * data.batch_size + micro * size
        samples = self.samples(step, start, start + size).tolist()
        if isinstance(self.source, RemoteShards):
            self.source.ahead(samples)
        shown, bad = images(step // self.steps_per_epoch, samples)
        drawn = masks.draw(self.config.mask, self.config.grid, self.config.runtime.seed, step, start, start + size, self.total)
        joint, separate = self.config.joint, self.config.separate
        packed = pack(*drawn, images=data.batch_size, joint=joint, budget=self.budget, separate=separate)
        return Batch(shown, *packed, bad=tuple(dict.fromkeys(bad)))

    @torch.inference_mode()  # saves a fifth of the time at 28 pixels
    def _decoded(self, epoch: int, samples: list[int]) -> tuple[Tensor, list[str]]:
        images = torch.zeros(len(samples), self.config.data.channels, *self.config.image_size, dtype=torch.uint8)
        bad = []
        for row, sample in zip(images, samples, strict=True):
            image, unreadable = self.view(epoch, sample)
            bad += unreadable
            if image is None:
                break  # past max_bad: the loader stops the run on `bad`
            row.copy_(image)
        return images, bad

    def samples(self, step: int, start: int, stop: int) -> np.ndarray:
        """The samples shown in slots start to stop of the step's global batch; each epoch is one permutation."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, generator(self.config.runtime.seed, ORDER, epoch).permutation(len(self.source))
        return self._order[1][within * self.total + start : within * self.total + stop]

    def view(self, epoch: int, sample: int) -> tuple[Tensor | None, list[str]]:
        """(C, H, W) uint8, the sample's crop in this epoch or that of a substitute, None past max_bad; the bad files met."""

        def make(raw: bytes | np.ndarray, crop_of: CropOf) -> Tensor:
            image = decode(raw, self.config.data.channels)
            box, flip = crop_of(*image.shape[1:])
            return crop(image, box, self.config.image_size, flip)

        return self._first_readable(epoch, sample, make)

    def _first_readable(
        self, epoch: int, sample: int, make: Callable[[bytes | np.ndarray, CropOf], T]
    ) -> tuple[T | None, list[str]]:
        """make(bytes or pixels, crop_of) of the first candidate that can be read; the names of those that cannot."""
        data = self.config.data
        uniforms = generator(self.config.runtime.seed, BOXES, epoch, sample * BLOCKS_PER_SAMPLE).random(4 * BLOCKS_PER_SAMPLE)
        uniforms = uniforms.tolist()

        def crop_of(height: int, width: int) -> tuple[Box, bool]:
            flip = data.use_horizontal_flip and uniforms[4 * TRIES] < 0.5
            return crop_box(height, width, data.crop_scale, uniforms), flip

        unreadable: dict[int, str] = {}
        for candidate in self._candidates(epoch, sample):
            try:
                return make(self.source.read(candidate), crop_of), list(unreadable.values())
            except (DecodeError, OSError):
                unreadable[candidate] = self.source.name(candidate)
            if len(unreadable) > self.max_bad:
                return None, list(unreadable.values())

    def _candidates(self, epoch: int, sample: int) -> Iterator[int]:
        """The sample, then substitutes without end; each sample's stream is 2**64 blocks long."""
        yield sample
        draws = generator(self.config.runtime.seed, SUBSTITUTES, epoch, sample << 64)
        while True:
            yield int(draws.random() * len(self.source))


class EncodedBatches(MicroBatches):
    """The same micro-batches with their images still to be decoded by DALI: `images` is Encoded."""

    def __getitem__(self, item: int) -> Batch:
        return self.without(item, {})

    def without(self, item: int, refused: Mapping[int, str]) -> Batch:
        """Micro-batch `item` when DALI refuses the files in some rows, for the reasons given.

        Those rows become the pixels that Pillow reads, of the sample or of a substitute: DALI takes any. The others do not
        change.
        """
        return self._batch(item, functools.partial(self._views, refused))

    def _views(self, refused: Mapping[int, str], epoch: int, samples: list[int]) -> tuple[Encoded, list[str]]:
        views, bad = [], []
        for row, sample in enumerate(samples):
            view, unreadable = self._first_readable(epoch, sample, self._pixels if row in refused else self._file)
            if row in refused and not unreadable:
                log.warning("%s: Pillow decodes it, DALI cannot (%s)", self.source.name(sample), refused[row])
            bad += unreadable
            views.append(view or NOTHING)  # past max_bad: the loader stops the run on `bad`
            if view is None:
                break
        return Encoded.of(views), bad

    def _file(self, raw: bytes | np.ndarray, crop_of: CropOf) -> View:
        if isinstance(raw, bytes):
            header = decode_torch.header(raw)
            if decode_dali.reads(header, raw):
                return View(raw, *crop_of(header.height, header.width))
        return self._pixels(raw, crop_of)

    def _pixels(self, raw: bytes | np.ndarray, crop_of: CropOf) -> View:
        image = decode(raw, self.config.data.channels)
        (top, left, height, width), flip = crop_of(*image.shape[1:])
        return View(decode_dali.pnm(image[:, top : top + height, left : left + width]), (0, 0, height, width), flip)


NOTHING = View(decode_dali.pnm(torch.zeros(1, 1, 1, dtype=torch.uint8)), (0, 0, 1, 1), False)


def decoder(loader: str, device: str) -> tuple[str, str]:
    """What decodes files, "dali" or "torch", by data.loader and runtime.device, and why.

    ConfigError where DALI is asked for and not installed. `auto` takes it on a GPU alone: on CPUs Pillow in the loader's
    processes was measured as fast or faster.
    """
    if loader != "auto":
        if loader == "dali":
            decode_dali.require()
        return loader, f"data.loader: {loader}"
    if not (device == "cuda" or device == "auto" and torch.cuda.is_available()):
        return "torch", "on CPUs Pillow is as fast as DALI; data.loader: dali takes it all the same"
    if not decode_dali.installed():
        return "torch", "DALI is not installed; it decodes on the GPU: pip install 'fastjepa[dali]'"
    return "dali", "it decodes on the GPU"


def decodes_with_dali(config: Config, source: Source) -> bool:
    """Whether this run's images are decoded by DALI: never idx files, which are pixels. ConfigError as `decoder`."""
    return decoder(config.data.loader, config.runtime.device)[0] == "dali" and not isinstance(source, IdxPair)


def check(config: Config, source: Source, world: int) -> None:
    """ConfigError when the source is smaller than a global batch of data.batch_size * world images, or DALI is missing."""
    decodes_with_dali(config, source)
    size = config.data.batch_size
    if len(source) < size * world:
        raise ConfigError(
            f"the data holds {len(source)} images, fewer than one global batch of {size * world} "
            f"(data.batch_size {size} x {world} ranks); lower data.batch_size or add images"
        )


class Loader(AbstractContextManager):
    """This rank's micro-batches of steps `start_step` to `stop_step`, made ahead of time by `data.num_workers` processes.

    `bad` holds the paths of the undecodable files this rank has met (each rank counts its own); fill it from a checkpoint
    to go on counting. ConfigError as `check`, and, from `micro_batches`, when `bad` outgrows data.max_bad.
    """

    def __init__(
        self, config: Config, source: Source, rank: int, world: int, start_step: int, device, stop_step: int | None = None
    ):
        check(config, source, world)
        dali = decodes_with_dali(config, source)
        dataset = (EncodedBatches if dali else MicroBatches)(config, source, rank, world)
        self.bad: set[str] = set()
        self.steps_per_epoch, self._n_micro, self._max_bad = dataset.steps_per_epoch, dataset.n_micro, dataset.max_bad
        self._device = torch.device(device)
        self._steps = range(start_step, sys.maxsize // self._n_micro if stop_step is None else stop_step)
        items = range(start_step * self._n_micro, self._steps.stop * self._n_micro)
        # Before DALI starts its threads: a process forks best while it has one.
        self._workers = self._batches = iter(_data_loader(config, dataset, items, self._device))
        if dali:
            self._batches = decode_dali.Decoder(
                self._workers,
                lambda position, refused: dataset.without(items.start + position, refused),
                _dali_settings(config, self._device),
            )
        atexit.register(self.close)  # before multiprocessing's own, which would wait for ever for deaf workers

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """The micro-batches of `step` on the device, in order; steps must be asked for one after the other."""
        assert step in self._steps[:1], f"step {step} asked for, {self._steps} are next"
        self._steps = self._steps[1:]
        for batch in itertools.islice(self._batches, self._n_micro):
            self._count(batch.bad)
            yield batch.to(self._device, non_blocking=True)

    def _count(self, paths: tuple[str, ...]) -> None:
        for path in [path for path in paths if path not in self.bad]:
            self.bad.add(path)
            log.warning("%s: cannot be decoded, replaced by another image (at most %d may be)", path, self._max_bad)
        if paths and len(self.bad) > self._max_bad:
            raise ConfigError(
                f"{len(self.bad)} files cannot be decoded, more than the {self._max_bad} allowed, for example {paths[0]}; "
                "repair or remove them, or raise data.max_bad"
            )

    def close(self) -> None:
        """End the worker processes and DALI's pipeline."""
        atexit.unregister(self.close)
        if isinstance(self._batches, decode_dali.Decoder):
            self._batches.close()
        workers, self._workers, self._batches = self._workers, iter(()), iter(())
        if hasattr(workers, "_shutdown_workers"):  # DataLoader has no public way to end them at a known time
            workers._shutdown_workers()
            for worker in workers._workers:
                worker.kill()  # in the middle of a long micro-batch

    def __exit__(self, *exception: object) -> None:
        self.close()


def _data_loader(config: Config, dataset: MicroBatches, items: range, device: torch.device) -> DataLoader:
    data = config.data
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=items,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch if data.num_workers else None,
        pin_memory=data.pin_mem and device.type == "cuda",
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # the global one must not move
    )


def _dali_settings(config: Config, device: torch.device) -> decode_dali.Settings:
    data = config.data
    threads = data.decode_threads or max(1, data.num_workers)
    gpu = {name: getattr(data, name) for name in decode_dali.GPU_OPTIONS}
    return decode_dali.Settings(config.micro_batch, data.channels, config.image_size, device, threads, data.prefetch, gpu)


def _ignore_signals(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the training process alone decides when the run ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
