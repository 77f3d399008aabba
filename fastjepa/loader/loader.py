"""The loader: micro-batches ahead of the step, on the device."""

import atexit
import itertools
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch.utils.data import DataLoader

from fastjepa.config.schema import Config
from fastjepa.data.decode_dali import GPU_OPTIONS, DaliDecoder, DaliSettings, dali_installed, require_dali
from fastjepa.data.sources import IdxPair, Source
from fastjepa.errors import ConfigError
from fastjepa.loader import micro_batches
from fastjepa.loader.batch import Batch
from fastjepa.loader.micro_batches import EncodedBatches, MicroBatches

micro_batches.log = logging.getLogger(__name__)


def choose_decoder(loader: str, device: str) -> tuple[str, str]:
    """What decodes files, "dali" or "torch", by data.loader and runtime.device, and why.

    ConfigError where DALI is asked for and not installed. `auto` takes it on a GPU alone: on CPUs Pillow in the loader's
    processes was measured as fast or faster.
    """
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
    """Whether this run's images are decoded by DALI: never idx files, which are pixels. ConfigError as `decoder`."""
    return choose_decoder(config.data.loader, config.runtime.device)[0] == "dali" and not isinstance(source, IdxPair)


def check_loader(config: Config, source: Source, world: int) -> None:
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
        check_loader(config, source, world)
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
            self._batches = DaliDecoder(
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
            micro_batches.log.warning(
                "%s: cannot be decoded, replaced by another image (at most %d may be)", path, self._max_bad
            )
        if paths and len(self.bad) > self._max_bad:
            raise ConfigError(
                f"{len(self.bad)} files cannot be decoded, more than the {self._max_bad} allowed, for example {paths[0]}; "
                "repair or remove them, or raise data.max_bad"
            )

    def close(self) -> None:
        """End the worker processes and DALI's pipeline."""
        atexit.unregister(self.close)
        if isinstance(self._batches, DaliDecoder):
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


def _dali_settings(config: Config, device: torch.device) -> DaliSettings:
    data = config.data
    threads = data.decode_threads or max(1, data.num_workers)
    gpu = {name: getattr(data, name) for name in GPU_OPTIONS}
    return DaliSettings(config.micro_batch, data.channels, config.image_size, device, threads, data.prefetch, gpu)


def _ignore_signals(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the training process alone decides when the run ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
