"""Images from disk to the device. Sources know files and labels; the loader alone decides order, boxes and substitutes.

Every byte of a batch is a function of (config, rank, step, micro-batch), whatever the number of worker processes and
wherever a run was resumed. A source is a numbered set of images: `len(source)`; `read(i)`, an encoded file or (H, W) or
(H, W, 3) uint8; `name(i)`, where it lies; `label(i)`, an int or None; `classes`, the labels' names, () without labels.
"""

import atexit
import glob
import gzip
import itertools
import logging
import math
import os
import signal
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastjepa import catalog, masks
from fastjepa.config import Config, ConfigError, DataConfig
from fastjepa.decode_torch import Box, DecodeError, crop, decode
from fastjepa.draws import BOXES, ORDER, SUBSTITUTES, generator
from fastjepa.packing import Blocks, Movable, Packed, pack

log = logging.getLogger(__name__)

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}
ASPECT = (3 / 4, 4 / 3)  # width / height of a crop
TRIES = 10  # boxes tried before the central crop
BLOCKS_PER_SAMPLE = TRIES + 1  # four doubles a try, and one block for the flip


class ImageFolder:
    """Image files at any depth below `root`, in sorted order; hidden files are passed over.

    Labels are the first-level folders when every image lies in one.
    """

    def __init__(self, root: str | Path):
        self.root = str(root)
        paths = sorted(_image_files(self.root))
        if not paths:
            raise ConfigError(f"{root}: no image files in it; give a directory that holds {' '.join(sorted(ENDINGS))} files")
        # One array: lists of a million strings would be copied into every worker as their reference counts change.
        self._paths = np.array([os.fsencode(path) for path in paths])
        labelled = all(os.sep in path for path in paths)
        folders = [path.split(os.sep, 1)[0] for path in paths] if labelled else []
        self.classes = tuple(sorted(set(folders)))
        self._labels = np.unique(folders, return_inverse=True)[1] if labelled else None

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._paths[i]))

    def read(self, i: int) -> bytes:
        with open(self.name(i), "rb", buffering=0) as file:
            return file.read()

    def label(self, i: int) -> int | None:
        return None if self._labels is None else int(self._labels[i])


def _image_files(root: str) -> Iterator[str]:
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(folder, root)
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in ENDINGS:
                yield name if inside == "." else os.path.join(inside, name)


class TarShards:
    """WebDataset shards: samples in the order of the shards, read at random through an index of member offsets.

    As WebDataset has it, a sample's key is its path up to the first dot of the file name and the rest is the field's
    name: `a/001.jpg` and `a/001.cls` are one sample. Labels are read from .cls when every sample has one.
    """

    def __init__(self, shards: Sequence[str], where: str):
        self._shards = list(shards)
        found = [(number, *sample) for number, shard in enumerate(shards) for sample in _index_shard(shard)]
        if not found:
            raise ConfigError(f"{where}: no images in its {len(shards)} tar shards; give .tar files that hold images")
        number, member, offset, size, label = zip(*found, strict=True)
        self._members = np.array([os.fsencode(name) for name in member])
        self._places = np.array([number, offset, size]).T  # (n, 3): shard, byte offset, bytes
        self._labels = np.array(label) if None not in label else None
        self.classes = () if self._labels is None else tuple(map(str, range(self._labels.max() + 1)))

    def __len__(self) -> int:
        return len(self._members)

    def name(self, i: int) -> str:
        return f"{self._shards[self._places[i, 0]]}/{os.fsdecode(self._members[i])}"

    def read(self, i: int) -> bytes:
        number, offset, size = self._places[i].tolist()
        with open(self._shards[number], "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def label(self, i: int) -> int | None:
        return None if self._labels is None else int(self._labels[i])


def _index_shard(shard: str) -> list[tuple[str, int, int, int | None]]:
    """(member, offset, size, label) of every image in a tar file; ConfigError for one that is damaged."""
    images, labels = [], {}
    try:
        with tarfile.open(shard, "r:") as opened:
            for member in opened:
                folder, _, name = member.name.rpartition("/")
                stem, _, field = name.partition(".")
                if member.isfile() and f".{field.lower()}" in ENDINGS and stem:
                    images.append(((folder, stem), member))
                elif member.isfile() and field == "cls":
                    labels[folder, stem] = int(opened.extractfile(member).read())
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ConfigError(f"{shard}: not a tar shard that can be read ({error}); make it again, uncompressed") from error
    return [(member.name, member.offset_data, member.size, labels.get(key)) for key, member in images]


class IdxPair:
    """MNIST-style idx files, plain or gzipped, held in memory: `train-*` for split train, `t10k-*` for val and test."""

    def __init__(self, directory: str | Path, split: str = "train", classes: tuple[str, ...] = ()):
        prefix = "train" if split == "train" else "t10k"
        self._images, self._file = _read_idx(Path(directory), f"{prefix}-images-idx3-ubyte", dims=3)
        self._labels, labels_file = _read_idx(Path(directory), f"{prefix}-labels-idx1-ubyte", dims=1)
        if len(self._labels) != len(self._images) or not len(self._images):
            raise ConfigError(f"{labels_file}: {len(self._labels)} labels for {len(self._images)} images; get both files again")
        self.classes = classes or tuple(map(str, range(int(self._labels.max()) + 1)))

    def __len__(self) -> int:
        return len(self._images)

    def name(self, i: int) -> str:
        return f"{self._file}[{i}]"

    def read(self, i: int) -> np.ndarray:
        return self._images[i]

    def label(self, i: int) -> int:
        return int(self._labels[i])


def _read_idx(directory: Path, stem: str, dims: int) -> tuple[np.ndarray, Path]:
    """The uint8 array of an idx file: bytes 0 0 8 dims, the shape as big-endian int32, the values."""
    path = next((p for p in (directory / stem, directory / f"{stem}.gz") if p.is_file()), None)
    if path is None:
        raise ConfigError(f"{directory / stem}.gz: no such file; put the four idx files of the data set into {directory}")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be unpacked ({error}); delete it and get it again") from error
    header = 4 + 4 * dims
    shape = np.frombuffer(raw[4:header], dtype=">i4").tolist()
    if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) != header + math.prod(shape):
        raise ConfigError(f"{path}: not an idx file of {dims} dimensions of bytes; delete it and get it again")
    return np.frombuffer(bytearray(raw), dtype=np.uint8, offset=header).reshape(shape), path


Source = ImageFolder | TarShards | IdxPair


def open_source(source: DataConfig | str | Path, split: str = "train") -> Source:
    """Open a data set by catalog name, directory, tar shard or glob of shards.

    A directory with train/ beside val/ or test/ is split by them; any other directory is all train. It may hold images
    at any depth, *.tar shards, or MNIST-style idx files. `split` is "train", "val" or "test"; val and test stand in for
    each other. ConfigError, naming the path and the remedy, when there is nothing to read.
    """
    where = os.path.expanduser(_configured(source) if isinstance(source, DataConfig) else source)
    if where in catalog.ENTRIES:
        return _open_directory(catalog.find(where), split, catalog.ENTRIES[where].classes)
    if where.endswith(".tar") or glob.has_magic(where):
        shards = sorted(path for path in glob.glob(where, recursive=True) if path.endswith(".tar"))
        return TarShards(_only_train(shards, where, split), where)
    if os.path.isdir(where):
        return _open_directory(Path(where), split)
    raise ConfigError(f"data source {where!r} is neither a directory nor a data set's name; {catalog.nearest(where)}")


def _configured(data: DataConfig) -> str:
    where = data.source or os.path.join(data.root_path or "", data.image_folder or "")
    if not where:
        raise ConfigError(f"data.source is not set; give a directory, or one of: {', '.join(catalog.ENTRIES)}")
    return where


def _open_directory(root: Path, split: str, classes: tuple[str, ...] = ()) -> Source:
    if any(root.glob("*-images-idx3-ubyte*")):
        return IdxPair(root, split, classes)
    folder = _split_folder(root, split)
    shards = sorted(map(str, folder.glob("*.tar")))
    return TarShards(shards, str(folder)) if shards else ImageFolder(folder)


def _split_folder(root: Path, split: str) -> Path:
    folders = {entry.name for entry in os.scandir(root) if entry.is_dir()}
    if "train" in folders and (folders & {"val", "test"} or folders == {"train"}):
        for name in ["train"] if split == "train" else [split, *sorted({"val", "test"} & folders)]:
            if name in folders:
                return root / name
    return _only_train(root, root, split)


def _only_train(found, where: str | Path, split: str):
    if split != "train":
        raise ConfigError(f"{where}: has no {split} split; put its images into train/ and {split}/ folders")
    return found


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

    images: Tensor  # (b, C, H, W): uint8 as loaded, fp32 and normalised once on the device
    context: Packed  # K*b sequences of context patches
    target: Packed  # b sequences, the union of each image's target blocks
    blocks: Blocks
    bad: tuple[str, ...]  # files replaced in this micro-batch

    def to_device(self, device: torch.device, mean_std: tuple[tuple[float, ...], tuple[float, ...]]) -> "Batch":
        """On the device, images as (x / 255 - mean) / std in fp32; asynchronous from pinned memory."""
        moved = self.to(device, non_blocking=True)
        scale, shift = _affine(mean_std, device)
        return replace(moved, images=moved.images.float().mul_(scale).add_(shift))


@lru_cache
def _affine(mean_std: tuple[tuple[float, ...], tuple[float, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(C, 1, 1) scale and shift, made once a device: making them each step would wait for the device."""
    mean, std = (np.array(values)[:, None, None] for values in mean_std)
    return tuple(torch.tensor(v, dtype=torch.float32, device=device) for v in (1 / (255 * std), -mean / std))


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


class Loader(AbstractContextManager):
    """This rank's micro-batches of steps `start_step` to `stop_step`, made ahead of time by `data.num_workers` processes.

    `bad` holds the paths of the undecodable files this rank has met (each rank counts its own); fill it from a checkpoint
    to go on counting. ConfigError when the source is smaller than one global batch of data.batch_size * world images,
    and, from `micro_batches`, when `bad` outgrows data.max_bad.
    """

    def __init__(
        self, config: Config, source: Source, rank: int, world: int, start_step: int, device, stop_step: int | None = None
    ):
        data = config.data
        if len(source) < data.batch_size * world:
            raise ConfigError(
                f"the data holds {len(source)} images, fewer than one global batch of {data.batch_size * world} "
                f"(data.batch_size {data.batch_size} x {world} ranks); lower data.batch_size or add images"
            )
        dataset = MicroBatches(config, source, rank, world)
        self.bad: set[str] = set()
        self.steps_per_epoch, self._n_micro, self._max_bad = dataset.steps_per_epoch, dataset.n_micro, dataset.max_bad
        self._config, self._device = config, torch.device(device)
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
            yield batch.to_device(self._device, self._config.mean_std)

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
