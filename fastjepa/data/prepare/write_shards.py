"""WebDataset shards made of any source: the work of `fastjepa data shard`."""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor

from fastjepa.data.decode_arrays import NPZ_SIGNATURE, TIFF_SIGNATURES, is_numpy_file
from fastjepa.data.decode_pillow import DecodeError, decode_image
from fastjepa.data.endings import ARRAY_ENDINGS, image_endings
from fastjepa.data.prepare.processes import counting_bar, map_in_processes
from fastjepa.data.sources import Source
from fastjepa.data.tar_shards import (
    INDEX_ARRAYS,
    MANIFEST_FORMAT,
    SHARDS_MANIFEST,
    SHARDS_PLAN,
    STALE_INDEX,
    index_path,
    stored_index,
    tar_fingerprint,
    tars_in,
)
from fastjepa.errors import UserError
from fastjepa.files import atomic_path, locked_folder, write_atomic

JPEG_QUALITY = 95  # of the JPEGs that --resize writes
SAMPLED_IMAGES = 256  # images whose sizes tell how many fit into a shard
LOSSY_FORMATS = {
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".mpo",
    ".webp",
    ".avif",
    ".avifs",
    ".jp2",
    ".jpf",
    ".jpx",
    ".j2k",
    ".jpc",
    ".j2c",
}
# By Pillow's names of formats.
SUFFIX_OF = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "GIF": ".gif", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif",
            "PPM": ".ppm", "JPEG2000": ".jp2"}  # fmt: skip


@dataclass(frozen=True)
class ShardRequest:
    """The wishes for a set of shards: all that their bytes depend on beside the source.

    Images that are not larger than `resize` keep their bytes, as all do without it. The order of the source makes sample i of
    the shards sample i of the source; otherwise there is one shuffle, for readers that go through shards in order.
    """

    shard_bytes: int  # about, of each shard
    resize: int | None = None  # pixels that the short side is brought down to: bicubic, JPEG, or PNG from lossless files
    keep_order: bool = False
    max_bad: int = 0  # images that may be left out because they cannot be read or, to be resized, not decoded

    def options(self) -> dict:
        """Return the part of the plan by which shards of another request are told; max_bad changes no image."""
        return {"shard_bytes": self.shard_bytes, "resize": self.resize, "quality": JPEG_QUALITY if self.resize else None,
                "order": "source" if self.keep_order else "shuffled"}  # fmt: skip


@dataclass(frozen=True)
class ShardJob:
    """All that a process needs to write any of the shards."""

    source: Source
    folder: Path
    request: ShardRequest
    per_shard: int  # images in each but the last

    @property
    def shards(self) -> int:
        """The number of shards: 26 images, 4 a shard, make 7."""
        return math.ceil(len(self.source) / self.per_shard)

    def samples(self, number: int) -> list[int]:
        """Return the samples of the source that a shard holds."""
        count = len(self.source)
        order = np.arange(count) if self.request.keep_order else np.random.default_rng(0).permutation(count)
        return order[number * self.per_shard : (number + 1) * self.per_shard].tolist()


def write_shards(source: Source, folder: Path, origin: dict, request: ShardRequest, workers: int = 1) -> dict:
    """Write a source as tar shards into `folder`; return the manifest, which is written last.

    Where it was stopped it continues: shards that are complete are kept. Shards and their order depend on the source and
    on the request alone, not on `workers`.

    Args:
        origin: the entries that describe the source in the manifest.
        workers: processes that write, a shard each.

    UserError when the folder holds other shards, OSError when it cannot be written or too many images cannot be read.
    """
    _refuse_more(_not_opened(source), request.max_bad)
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"format": MANIFEST_FORMAT, "source": origin | {"images": len(source), "sha256": _identity(source)},
            "options": request.options(), "classes": list(source.classes)}  # fmt: skip
    with _only_writer(folder):
        known = _known(folder, plan)
        if known and not (folder / SHARDS_PLAN).exists():
            return known
        plan["per_shard"] = known["per_shard"] if known else _images_per_shard(source, request)
        write_atomic(folder / SHARDS_PLAN, _to_json(plan))
        manifest = plan | _write_all(ShardJob(source, folder, request, plan["per_shard"]), workers)
        write_atomic(folder / SHARDS_MANIFEST, _to_json(manifest))
        (folder / SHARDS_PLAN).unlink()
    return manifest


def _not_opened(source: Source) -> list[str]:
    """Return what the source lost when it was opened: damaged parts of tars, folders that cannot be read."""
    return [f"{path}: {reason}" for path, reason in getattr(source, "unreadable", ())]


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; OSError where another process holds it."""
    try:
        with locked_folder(folder, wait=False):
            yield
    except BlockingIOError as error:
        raise OSError(f"{folder}: another process is writing shards there; wait for it") from error


def _to_json(content: dict) -> str:
    return json.dumps(content, indent=1) + "\n"


def _write_all(job: ShardJob, workers: int) -> dict:
    """Write all shards; return the part of the manifest that is known when every shard is there."""
    entries, left_out = [], _not_opened(job.source)
    with (
        contextlib.closing(map_in_processes(_write_shard, job, range(job.shards), workers)) as results,
        counting_bar() as progress,
    ):
        task = progress.add_task(f"images into {job.shards} shards", total=len(job.source))
        for entry in results:
            lost = entry.pop("left_out")
            left_out += lost
            _refuse_more(left_out, job.request.max_bad)
            entries.append(entry)
            progress.advance(task, entry["images"] + len(lost))
    total = {key: sum(entry[key] for entry in entries) for key in ("images", "bytes")}
    return total | {"left_out": left_out, "shards": entries}


def _identity(source: Source) -> str:
    """Return the SHA-256 of every name and label, in order: what tells one source from another."""
    digest = hashlib.sha256()
    for i in range(len(source)):
        name = source.name(i)
        digest.update(os.fsencode(f"{name if '://' in name else os.path.abspath(name)}\0{source.label(i)}\n"))
    return digest.hexdigest()


def _known(folder: Path, plan: dict) -> dict | None:
    """Return the plan or manifest in a folder, which must say the same as `plan`; None for a folder without shards."""
    path = next((folder / name for name in (SHARDS_PLAN, SHARDS_MANIFEST) if (folder / name).is_file()), None)
    if path is None and not tars_in(folder):
        return None
    try:
        known = json.loads(path.read_bytes()) if path else {}
    except ValueError:
        known = {}
    differs = [key for key in plan if known.get(key) != plan[key]]
    if differs:
        raise UserError(f"{folder}: its shards differ in {' and '.join(differs)}; give another directory, or delete it")
    return known


def _images_per_shard(source: Source, request: ShardRequest) -> int:
    """Return how many images a shard gets, by the sizes of images spread evenly over the source; the last may get fewer.

    An image of 3,600 bytes takes 1 block of header and 8 of content, its label 2 more: 11 blocks of 512 bytes. A source of
    26 such in shards of 20,000 bytes makes ceil(26 * 5632 / 20000) = 8 shards of ceil(26 / 8) = 4 images.
    """
    sizes = []
    for i in np.linspace(0, len(source) - 1, min(len(source), SAMPLED_IMAGES)).astype(int).tolist():
        with contextlib.suppress(OSError, DecodeError):  # counted where they are written
            content, _ = _content(source, i, request.resize)
            blocks = 1 + math.ceil(len(content) / tarfile.BLOCKSIZE) + 2 * (source.label(i) is not None)
            sizes.append(blocks * tarfile.BLOCKSIZE)
    shards = math.ceil(len(source) * np.mean(sizes or [1]) / request.shard_bytes)
    return math.ceil(len(source) / max(1, shards))


def _content(source: Source, i: int, resize: int | None) -> tuple[bytes, str]:
    """Return (encoded image, suffix) of a sample; OSError or DecodeError when it cannot be had."""
    raw, suffix = source.read(i), os.path.splitext(source.name(i))[1].lower()
    image = decode_image(raw, 3) if resize else None
    known = suffix in image_endings() | ARRAY_ENDINGS
    kind = ".png" if isinstance(raw, np.ndarray) else suffix if known else _suffix(raw)
    if image is not None and min(image.shape[1:]) > resize:
        pixels = _resized(image, resize)
        if kind in LOSSY_FORMATS:
            return _encode_image(pixels, "JPEG", quality=JPEG_QUALITY), ".jpg"
        return _encode_image(pixels, "PNG"), ".png"
    return (_encode_image(Image.fromarray(raw), "PNG") if isinstance(raw, np.ndarray) else raw), kind


def _resized(image: Tensor, side: int) -> Image.Image:
    """Return a (3, H, W) uint8 image with its short side brought down to `side`, bicubic; 90 x 120 to 30 gives 30 x 40."""
    grey = image.stride(0) == 0  # how `decode_image` makes three channels of one
    pixels = Image.fromarray((image[0] if grey else image.permute(1, 2, 0)).contiguous().numpy())
    scale = side / min(pixels.size)
    return pixels.resize([max(side, round(length * scale)) for length in pixels.size], Image.Resampling.BICUBIC)


def _suffix(raw: bytes) -> str:
    """Return the suffix that fits the first bytes of a file.

    It is .jpg for what is no image, so that it is met, and counted, as an image that cannot be read.
    """
    if is_numpy_file(raw):
        return ".npz" if raw.startswith(NPZ_SIGNATURE) else ".npy"
    if raw.startswith(TIFF_SIGNATURES):
        return ".tif"
    with contextlib.suppress(Exception), Image.open(io.BytesIO(raw)) as image:
        return SUFFIX_OF.get(image.format, ".jpg")
    return ".jpg"


def _encode_image(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


class _HashedFile:
    """A file to write to that knows the SHA-256 of all that it was given."""

    def __init__(self, file: BinaryIO):
        self._file, self.sha256, self._at = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        self._at += len(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self._at


def _write_shard(job: ShardJob, number: int) -> dict:
    """Write a shard and then its index, unless both are there; return its entry of the manifest, with `left_out`."""
    tar = job.folder / f"{number:06d}.tar"
    with contextlib.suppress(*STALE_INDEX):
        return json.loads(stored_index(tar)["entry"].item())
    try:
        return _write_new(job, number, tar)
    except OSError as error:
        if error.errno is None:  # a sentence of ours
            raise
        raise OSError(f"{tar}: cannot be written ({error.strerror}); mend that and run again, which continues") from error


def _write_new(job: ShardJob, number: int, tar: Path) -> dict:
    """Write a shard and its index, each there whole or not at all; return the entry of the manifest."""
    with atomic_path(tar) as hidden, open(hidden, "wb") as file:
        hashed = _HashedFile(file)
        places, left_out = _write_tar(hashed, job, number)
    entry = {"file": tar.name, "images": len(places), "bytes": hashed.tell(), "sha256": hashed.sha256.hexdigest()}
    members, *numbers = zip(*places, strict=True) if places else ((), (), (), ())
    arrays = [np.array(members, dtype="S"), *(np.array(values, dtype=np.int64) for values in numbers)]
    named = dict(zip(INDEX_ARRAYS, arrays, strict=True))
    entry["left_out"] = left_out
    with atomic_path(index_path(tar)) as hidden:
        np.savez(hidden, **named, fingerprint=tar_fingerprint(tar), entry=json.dumps(entry))
    return entry


def _write_tar(stream: _HashedFile, job: ShardJob, number: int) -> tuple[list[tuple[str, int, int, int]], list[str]]:
    """Write the members of a shard; return (name, offset, size, label) of its images, and the names of those left out.

    An image's bytes begin a block of 512 after the stream's position, which is where its header goes; without a label, -1.
    """
    places, left_out = [], []
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as opened:
        for i in job.samples(number):
            name = job.source.name(i)
            try:
                content, suffix = _content(job.source, i, job.request.resize)
            except (OSError, DecodeError):
                left_out.append(name)
                _refuse_more(left_out, job.request.max_bad)
                continue
            # A dot would end the key; the stem says where a picture came from, the number that no two are the same.
            key = f"{i:08d}-{re.sub('[^A-Za-z0-9_-]+', '_', Path(name).stem)[:60]}"
            label = job.source.label(i)
            places.append((key + suffix, stream.tell() + tarfile.BLOCKSIZE, len(content), -1 if label is None else label))
            _add_member(opened, key + suffix, content)
            if label is not None:
                _add_member(opened, f"{key}.cls", str(label).encode())
    return places, left_out


def _add_member(opened: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # mode 0644, time 0: the same bytes whoever writes them, and when
    member.size = len(content)
    opened.addfile(member, io.BytesIO(content))


def _refuse_more(left_out: list[str], max_bad: int) -> None:
    """Raise OSError when more images were left out than may be."""
    if len(left_out) > max_bad:
        raise OSError(
            f"{left_out[0]}: cannot be read, as {len(left_out)} so far, more than the {max_bad} that may be left out; "
            "see `fastjepa data check`, then mend them or raise --max-bad"
        )
