"""Any source as WebDataset shards: what `fastjepa data shard` does."""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from fastjepa.data.decode_pillow import DecodeError, decode_image
from fastjepa.data.prepare.processes import counting_bar, map_in_processes
from fastjepa.data.sources import Source
from fastjepa.data.tar_shards import (
    ENDINGS,
    MANIFEST_FORMAT,
    SHARDS_MANIFEST,
    SHARDS_PLAN,
    STALE_INDEX,
    ShardIndex,
    index_path,
    stored_index,
    tar_fingerprint,
)
from fastjepa.errors import UserError

JPEG_QUALITY = 95  # of the JPEGs that --resize writes
SAMPLED_IMAGES = 256  # images whose sizes tell how many fit into a shard
LOSSY_FORMATS = {".jpg", ".jpeg", ".webp", ".jp2"}
SUFFIX_OF = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "GIF": ".gif", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif",
            "PPM": ".ppm", "JPEG2000": ".jp2"}  # fmt: skip


@dataclass(frozen=True)
class ShardJob:
    """What a process needs to write any of the shards."""

    source: Source
    folder: Path
    per_shard: int
    resize: int | None
    keep_order: bool
    max_bad: int

    @property
    def shards(self) -> int:
        return math.ceil(len(self.source) / self.per_shard)

    def samples(self, number: int) -> list[int]:
        order = np.arange(len(self.source)) if self.keep_order else np.random.default_rng(0).permutation(len(self.source))
        return order[number * self.per_shard : (number + 1) * self.per_shard].tolist()


def write_shards(
    source: Source,
    folder: Path,
    origin: dict,
    shard_bytes: int,
    resize: int | None = None,
    keep_order: bool = False,
    workers: int = 1,
    max_bad: int = 0,
) -> dict:
    """Write a source as tar shards of about `shard_bytes` into `folder`; returns the manifest, which is written last.

    Where it was stopped it continues: shards that are complete are kept. Shards and their order depend on the source and
    on the arguments alone, not on `workers`.

    Args:
        origin: what the manifest says of the source.
        resize: the short side is brought down to it (bicubic, antialiased; JPEG of quality QUALITY, PNG from lossless
            files); images that are not larger keep their bytes, as all do without it.
        keep_order: sample i stays sample i; else one shuffle, for those who read shards as streams.
        max_bad: images that may be left out because they cannot be read, or, to be resized, not decoded.

    UserError when the folder holds other shards, OSError when it cannot be written or there are more than max_bad.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = {"shard_bytes": shard_bytes, "resize": resize, "quality": JPEG_QUALITY if resize else None,
               "order": "source" if keep_order else "shuffled"}  # fmt: skip
    plan = {"format": MANIFEST_FORMAT, "source": origin | {"images": len(source), "sha256": _identity(source)},
            "options": options, "classes": list(source.classes)}  # fmt: skip
    with _locked(folder):
        known = _known(folder, plan)
        if known and not (folder / SHARDS_PLAN).exists():
            return known
        plan["per_shard"] = known["per_shard"] if known else _images_per_shard(source, shard_bytes, resize)
        _write_json(folder / SHARDS_PLAN, plan)
        manifest = plan | _write_all(ShardJob(source, folder, plan["per_shard"], resize, keep_order, max_bad), workers)
        _write_json(folder / SHARDS_MANIFEST, manifest)
        (folder / SHARDS_PLAN).unlink()
    return manifest


def _write_all(job: ShardJob, workers: int) -> dict:
    """The part of the manifest that is known when every shard is there."""
    entries, left_out = [], []
    with (
        contextlib.closing(map_in_processes(_write_shard, job, range(job.shards), workers)) as results,
        counting_bar() as progress,
    ):
        task = progress.add_task(f"images into {job.shards} shards", total=len(job.source))
        for entry in results:
            lost = entry.pop("left_out")
            left_out += lost
            _refuse_more(left_out, job.max_bad)
            entries.append(entry)
            progress.advance(task, entry["images"] + len(lost))
    total = {key: sum(entry[key] for entry in entries) for key in ("images", "bytes")}
    return total | {"left_out": left_out, "shards": entries}


def _identity(source: Source) -> str:
    """SHA-256 of every name and label, in order."""
    digest = hashlib.sha256()
    for i in range(len(source)):
        name = source.name(i)
        digest.update(os.fsencode(f"{name if '://' in name else os.path.abspath(name)}\0{source.label(i)}\n"))
    return digest.hexdigest()


def _known(folder: Path, plan: dict) -> dict | None:
    """The plan or manifest in a folder, which must say the same as `plan`; None for a folder without shards."""
    path = next((folder / name for name in (SHARDS_PLAN, SHARDS_MANIFEST) if (folder / name).is_file()), None)
    if path is None and not any(folder.glob("*.tar")):
        return None
    try:
        known = json.loads(path.read_bytes()) if path else {}
    except ValueError:
        known = {}
    differs = [key for key in plan if known.get(key) != plan[key]]
    if differs:
        raise UserError(f"{folder}: its shards differ in {' and '.join(differs)}; give another directory, or delete it")
    return known


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        import fcntl  # not on Windows, where opening the directory has failed by now

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise OSError(f"{folder}: another process is writing shards there; wait for it") from error
    finally:
        os.close(descriptor)


def _write_json(path: Path, content: dict) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    _publish_manifest(partial, path)


def _publish_manifest(partial: Path, final: Path) -> None:
    """Rename once the bytes are on the disk: whatever has its final name is whole."""
    _sync_folder(partial)
    partial.rename(final)
    _sync_folder(final.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _images_per_shard(source: Source, shard_bytes: int, resize: int | None) -> int:
    """From the sizes of images spread evenly over the source; all shards get the same number but the last."""
    sizes = []
    for i in np.linspace(0, len(source) - 1, min(len(source), SAMPLED_IMAGES)).astype(int).tolist():
        with contextlib.suppress(OSError, DecodeError):  # counted where they are written
            blocks = 1 + math.ceil(len(_content(source, i, resize)[0]) / tarfile.BLOCKSIZE) + 2 * (source.label(i) is not None)
            sizes.append(blocks * tarfile.BLOCKSIZE)
    shards = math.ceil(len(source) * np.mean(sizes or [1]) / shard_bytes)
    return math.ceil(len(source) / max(1, shards))


def _content(source: Source, i: int, resize: int | None) -> tuple[bytes, str]:
    """(encoded image, suffix) of a sample; OSError or DecodeError when it cannot be had."""
    raw, suffix = source.read(i), os.path.splitext(source.name(i))[1].lower()
    image = decode_image(raw, 3) if resize else None
    if image is not None and min(image.shape[1:]) > resize:
        grey = image.stride(0) == 0  # how `decode` makes three channels of one
        pixels = Image.fromarray((image[0] if grey else image.permute(1, 2, 0)).contiguous().numpy())
        scale = resize / min(pixels.size)
        pixels = pixels.resize([max(resize, round(side * scale)) for side in pixels.size], Image.Resampling.BICUBIC)
        lossy = not isinstance(raw, np.ndarray) and (suffix if suffix in ENDINGS else _suffix(raw)) in LOSSY_FORMATS
        return (
            (_encode_image(pixels, "JPEG", quality=JPEG_QUALITY), ".jpg") if lossy else (_encode_image(pixels, "PNG"), ".png")
        )
    if isinstance(raw, np.ndarray):
        return _encode_image(Image.fromarray(raw), "PNG"), ".png"
    return raw, suffix if suffix in ENDINGS else _suffix(raw)


def _suffix(raw: bytes) -> str:
    """From the first bytes; .jpg for what is no image, so that it is met, and counted, as one that cannot be read."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(raw)) as image:
        return SUFFIX_OF.get(image.format, ".jpg")
    return ".jpg"


def _encode_image(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


class _Hashed:
    """A file to write to that knows the SHA-256 of what it was given."""

    def __init__(self, file: BinaryIO):
        self._file, self.sha256, self._at = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        self._at += len(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self._at


def _write_shard(job: ShardJob, number: int) -> dict:
    """Write and publish a shard and then its index; one that is complete is kept. Its entry of the manifest."""
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
    partial, partial_index = tar.with_suffix(".tar.partial"), tar.with_suffix(".npz.partial")
    with open(partial, "wb") as file:
        hashed = _Hashed(file)
        places, left_out = _write_tar(hashed, job, number)
    entry = {"file": tar.name, "images": len(places), "bytes": hashed.tell(), "sha256": hashed.sha256.hexdigest()}
    _publish_manifest(partial, tar)
    members, *numbers = zip(*places, strict=True) if places else ((), (), (), ())
    arrays = [np.array(members, dtype="S"), *(np.array(values, dtype=np.int64) for values in numbers)]
    named = {field.name: array for field, array in zip(fields(ShardIndex), arrays, strict=True)}
    entry["left_out"] = left_out
    with open(partial_index, "wb") as file:
        np.savez(file, **named, fingerprint=tar_fingerprint(tar), entry=json.dumps(entry))
    _publish_manifest(partial_index, index_path(tar))
    return entry


def _write_tar(stream: _Hashed, job: ShardJob, number: int) -> tuple[list[tuple[str, int, int, int]], list[str]]:
    """The members of a shard: (name, offset, size, label) of its images, and the names of those left out."""
    places, left_out = [], []
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as opened:
        for i in job.samples(number):
            name = job.source.name(i)
            try:
                content, suffix = _content(job.source, i, job.resize)
            except (OSError, DecodeError):
                left_out.append(name)
                _refuse_more(left_out, job.max_bad)
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
    if len(left_out) > max_bad:
        raise OSError(
            f"{left_out[0]}: cannot be read, as {len(left_out)} images so far, more than the {max_bad} that may be left out; "
            "see `fastjepa data check`, then mend them or raise --max-bad"
        )
