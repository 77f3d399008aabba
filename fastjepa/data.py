"""Images from a source to the device. The loader alone decides order, boxes and substitutes.

Every byte of a batch is a function of (config, rank, step, micro-batch), whatever the number of worker processes and
wherever a run was resumed.
"""

import atexit
import itertools
import logging
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastjepa import masks
from fastjepa.config import Config, ConfigError
from fastjepa.decode_torch import Box, DecodeError, crop, decode
from fastjepa.draws import BOXES, ORDER, SUBSTITUTES, generator
from fastjepa.packing import Blocks, Movable, Packed, pack
from fastjepa.sources import Source

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


@dataclass(frozen=True)
class Batch(Movable):
    """A micro-batch of b images and their masks."""

    images: Tensor  # (b, C, H, W) uint8
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
        self.steps_per_epoch = len(source) // self.total
        # However large max_bad is, a source without one readable image must stop the run.
        self.max_bad = min(config.data.max_bad, len(source) - 1)
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, item: int) -> Batch:
        step, micro = divmod(item, self.n_micro)
        data, size = self.config.data, self.config.micro_batch
        start = self.rank * data.batch_size + micro * size
        images = torch.zeros(size, data.channels, *self.config.image_size, dtype=torch.uint8)
        bad = self._fill(images, step // self.steps_per_epoch, self.samples(step, start, start + size))
        drawn = masks.draw(self.config.mask, self.config.grid, self.config.runtime.seed, step, start, start + size, self.total)
        return Batch(images, *pack(*drawn, images=data.batch_size), bad=tuple(dict.fromkeys(bad)))

    @torch.inference_mode()  # saves a fifth of the time at 28 pixels
    def _fill(self, images: Tensor, epoch: int, samples: np.ndarray) -> list[str]:
        bad = []
        for row, sample in zip(images, samples.tolist(), strict=True):
            image, unreadable = self.view(epoch, sample)
            bad += unreadable
            if image is None:
                break  # past max_bad: the loader stops the run on `bad`
            row.copy_(image)
        return bad

    def samples(self, step: int, start: int, stop: int) -> np.ndarray:
        """The samples shown in slots start to stop of the step's global batch; each epoch is one permutation."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, generator(self.config.runtime.seed, ORDER, epoch).permutation(len(self.source))
        return self._order[1][within * self.total + start : within * self.total + stop]

    def view(self, epoch: int, sample: int) -> tuple[Tensor | None, list[str]]:
        """(C, H, W) uint8, the sample's crop in this epoch or that of a substitute, None past max_bad; the bad files met."""
        data, seed = self.config.data, self.config.runtime.seed
        unreadable: dict[int, str] = {}
        for candidate in self._candidates(epoch, sample):
            try:
                image = decode(self.source.read(candidate), data.channels)
                break
            except (DecodeError, OSError):
                unreadable[candidate] = self.source.name(candidate)
            if len(unreadable) > self.max_bad:
                return None, list(unreadable.values())
        uniforms = generator(seed, BOXES, epoch, sample * BLOCKS_PER_SAMPLE).random(4 * BLOCKS_PER_SAMPLE).tolist()
        box = crop_box(image.shape[1], image.shape[2], data.crop_scale, uniforms)
        flip = data.use_horizontal_flip and uniforms[4 * TRIES] < 0.5
        return crop(image, box, self.config.image_size, flip), list(unreadable.values())

    def _candidates(self, epoch: int, sample: int) -> Iterator[int]:
        """The sample, then substitutes without end; each sample's stream is 2**64 blocks long."""
        yield sample
        draws = generator(self.config.runtime.seed, SUBSTITUTES, epoch, sample << 64)
        while True:
            yield int(draws.random() * len(self.source))


def check(config: Config, source: Source, world: int) -> None:
    """ConfigError when the source is smaller than one global batch of data.batch_size * world images."""
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
        data = config.data
        check(config, source, world)
        dataset = MicroBatches(config, source, rank, world)
        self.bad: set[str] = set()
        self.steps_per_epoch, self._n_micro, self._max_bad = dataset.steps_per_epoch, dataset.n_micro, dataset.max_bad
        self._device = torch.device(device)
        self._steps = range(start_step, sys.maxsize // self._n_micro if stop_step is None else stop_step)
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=range(start_step * self._n_micro, self._steps.stop * self._n_micro),
            num_workers=data.num_workers,
            pin_memory=data.pin_mem and self._device.type == "cuda",
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # the global one must not move
        )
        self._iterator = iter(loader)
        atexit.register(self.close)  # before multiprocessing's own, which would wait for ever for deaf workers

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """The micro-batches of `step` on the device, in order; steps must be asked for one after the other."""
        assert step in self._steps[:1], f"step {step} asked for, {self._steps} are next"
        self._steps = self._steps[1:]
        for batch in itertools.islice(self._iterator, self._n_micro):
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
        """End the worker processes."""
        atexit.unregister(self.close)
        iterator, self._iterator = self._iterator, iter(())
        if hasattr(iterator, "_shutdown_workers"):  # DataLoader has no public way to end them at a known time
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()  # in the middle of a long micro-batch

    def __exit__(self, *exception: object) -> None:
        self.close()


def _ignore_signals(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the training process alone decides when the run ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
