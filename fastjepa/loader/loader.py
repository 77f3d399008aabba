"""The loader: micro-batches made ahead of the step by worker processes, decoded, and moved to the device."""

import itertools
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from fastjepa.config.schema import Config
from fastjepa.data.crops import Crops
from fastjepa.data.decode_dali import DaliDecoder, DaliSettings, dali_installed, require_dali
from fastjepa.data.distortions import Distortions
from fastjepa.data.idx_files import IdxPair
from fastjepa.data.pixels import RGB_PICTURES, Pixels
from fastjepa.data.sources import Source
from fastjepa.errors import ConfigError, UserError
from fastjepa.loader.batch import Batch
from fastjepa.loader.micro_batches import BatchRecipe, EncodedBatches, MicroBatches
from fastjepa.loader.workers import Crew, Workers
from fastjepa.masks.layouts import Masking
from fastjepa.masks.packer import Packer
from fastjepa.ranks.world import World


def choose_decoder(loader: str, device: str, pixels: Pixels = RGB_PICTURES) -> tuple[str, str]:
    """Return what decodes files, "dali" or "torch", by data.loader, runtime.device and what pixels are, and why.

    ConfigError where DALI is asked for and not installed, or cannot decode such pixels. `auto` takes it on a GPU alone: on
    CPUs Pillow in the loader's processes was measured as fast or faster.
    """
    if not pixels.are_pictures and loader != "torch":
        if loader == "dali":
            raise ConfigError("data.loader: dali decodes pictures alone, 1 or 3 channels of 8 bits without data.bands, "
                              "data.nodata and data.pages; set it to auto or torch")  # fmt: skip
        return "torch", "DALI decodes 1 or 3 channels of 8 bits alone"
    if loader != "auto":
        if loader == "dali":
            require_dali()
        return loader, f"data.loader: {loader}"
    if not (device == "cuda" or device == "auto" and torch.cuda.is_available()):
        return "torch", "on CPUs Pillow is as fast as DALI; data.loader: dali takes it all the same"
    if not dali_installed():
        return "torch", "DALI is not installed; it decodes on the GPU: pip install 'fastjepa[dali]'"
    return "dali", "it decodes on the GPU"


def decodes_with_dali(config: Config, source: Source) -> bool:
    """Return whether DALI decodes a source: never idx files, which are pixels. Errors as `choose_decoder`."""
    way, _ = choose_decoder(config.data.loader, config.runtime.device, pixels_of(config))
    return way == "dali" and not isinstance(source, IdxPair)


def check_loader(config: Config, source: Source, ranks: int) -> None:
    """Raise ConfigError when the source is smaller than the global batch of all ranks, or for DALI that cannot serve."""
    decodes_with_dali(config, source)
    size = config.data.batch_size
    if len(source) < size * ranks:
        raise ConfigError(
            f"the data holds {len(source)} images, fewer than one global batch of {size * ranks} "
            f"(data.batch_size {size} x {ranks} ranks); lower data.batch_size or add images"
        )


def pixels_of(config: Config) -> Pixels:
    """Return what becomes of the bytes of a file, by the keys of a config; its mean and deviation may be unknown."""
    data = config.data
    return Pixels(data.channels, getattr(torch, data.dtype), data.bands, data.pages, data.nodata, data.mean_std)


def batch_recipe(config: Config) -> BatchRecipe:
    """Return the recipe of the micro-batches that a config asks for."""
    data, runtime = config.data, config.runtime
    return BatchRecipe(
        pixels=pixels_of(config),
        crops=Crops(config.image_size, data.crop_scale, data.use_horizontal_flip),
        masking=Masking.of(config),
        batch_size=data.batch_size,
        micro_batch=config.micro_batch,
        max_bad=data.max_bad,
        epochs=config.optimization.epochs,
        padded=runtime.cuda_graph,
        token_budget=runtime.token_budget,
        distortions=Distortions(data.use_color_distortion, data.color_jitter_strength, data.use_gaussian_blur),
    )


class Loader(AbstractContextManager):
    """One rank's micro-batches, made ahead of time by data.num_workers processes.

    `bad` holds the paths of the undecodable files this rank has met (each rank counts its own); fill it from a checkpoint
    to go on counting. What files hold beside their images is counted in the first epoch, and said at its end or the loader's.
    """

    def __init__(self, config: Config, source: Source, world: World, start_step: int, stop_step: int | None = None):
        """Start to make the micro-batches of steps `start_step` to `stop_step`, without end where that is not given.

        ConfigError as `check_loader`.
        """
        check_loader(config, source, world.size)
        dali = decodes_with_dali(config, source)
        dataset = (EncodedBatches if dali else MicroBatches)(batch_recipe(config), source, world.rank, world.size)
        self.bad: set[str] = set()
        self._dropped, self._read = Counter(), 0  # files by kind of `data.dropped`, of so many of the first epoch
        self.steps_per_epoch, self._n_micro, self._max_bad = dataset.steps_per_epoch, dataset.n_micro, dataset.max_bad
        self._device = world.device
        self._steps = range(start_step, sys.maxsize // self._n_micro if stop_step is None else stop_step)
        items = range(start_step * self._n_micro, self._steps.stop * self._n_micro)
        # Before DALI starts its threads: a process forks best while it has one.
        self._workers = self._batches = Workers(dataset, items, crew_of(config, self._device))
        if dali:
            self._batches = DaliDecoder(
                self._workers,
                lambda position, refused: dataset.without(items.start + position, refused),
                _dali_settings(config, self._device),
            )

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """Yield the micro-batches of `step` on the device, in order; steps must be asked for one after the other.

        UserError when `bad` outgrows data.max_bad.
        """
        assert step in self._steps[:1], f"step {step} asked for, {self._steps} are next"
        self._steps = self._steps[1:]
        for batch in itertools.islice(self._batches, self._n_micro):
            self._count(dict(zip(batch.bad, batch.reasons, strict=True)))
            self._count_dropped(batch)
            yield batch.to(self._device, non_blocking=True)
        if step + 1 == self.steps_per_epoch:
            self._say_dropped()

    def _count(self, found: dict[str, str]) -> None:
        """Add {path: reason} to the bad files, naming each once; UserError when they are too many."""
        for path in [path for path in found if path not in self.bad]:
            self.bad.add(path)
            said = "%s: cannot be decoded (%s), replaced by another image (at most %d may be)"
            logging.getLogger(__name__).warning(said, path, found[path], self._max_bad)
        if found and len(self.bad) > self._max_bad:
            path, reason = next(iter(found.items()))
            raise UserError(
                f"{len(self.bad)} files cannot be decoded, more than the {self._max_bad} allowed, "
                f"for example {path} ({reason}); repair or remove them, or raise data.max_bad"
            )

    def _count_dropped(self, batch: Batch) -> None:
        """Count what the files of a batch hold beside their images; name the first file of each kind."""
        self._read += len(batch.images)
        for name, kind in batch.dropped:
            if kind not in self._dropped:
                logging.getLogger(__name__).warning("%s: holds %s; such files are counted in the first epoch", name, kind)
            self._dropped[kind] += 1

    def _say_dropped(self) -> None:
        """Say in how many files each kind of thing was left out, once."""
        for kind, files in self._dropped.most_common():
            said = "%d of the %d files that this rank read in the first epoch hold %s"
            logging.getLogger(__name__).warning(said, files, self._read, kind)
        self._dropped.clear()

    def close(self) -> None:
        """End the worker processes and DALI's pipeline."""
        self._say_dropped()
        if isinstance(self._batches, DaliDecoder):
            self._batches.close()
        self._workers.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


def crew_of(config: Config, device: torch.device) -> Crew:
    """Return the worker processes of one rank by the keys of a config."""
    data = config.data
    return Crew(
        processes=data.num_workers,
        ahead=data.prefetch,
        pinned=data.pin_mem and device.type == "cuda",
        timeout=config.runtime.timeout,
        key="runtime.timeout",
        remedy=f"lower data.num_workers ({data.num_workers}) or data.prefetch ({data.prefetch})",
    )


def batch_bytes(config: Config) -> int:
    """Return the bytes of a micro-batch with decoded images, by the masks of the first step."""
    size, total = config.micro_batch, config.data.batch_size
    masking = Masking.of(config)
    packed = Packer(masking).packed(0, range(size), total)
    images = torch.empty(size, config.data.channels, *config.image_size, dtype=getattr(torch, config.data.dtype), device="meta")
    return sum(tensor.nbytes for tensor in Batch(images, *packed, bad=()).tensors())


def _dali_settings(config: Config, device: torch.device) -> DaliSettings:
    """Return the numbers of DALI's pipeline by the keys of a config."""
    data = config.data
    return DaliSettings(
        batch=config.micro_batch,
        channels=data.channels,
        size=config.image_size,
        device=device,
        threads=data.decode_threads or max(1, data.num_workers),
        ahead=data.prefetch,
        hw_decoder_load=data.hw_decoder_load,
    )
