"""WebDataset shards behind https:// or s3://, read at random by ranged requests.

A sample is one request, and still a function of its number: order, crops and resumption are those of a local disk. The
shards' index is fetched, or made by one pass over tars that have none, and kept below the folder of named data sets.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from fastjepa.data.patterns import BRACES, expand_braces
from fastjepa.data.prepare.catalog import data_dir, make_folder
from fastjepa.data.prepare.processes import counting_bar, map_in_processes
from fastjepa.data.remote_files import FEW_TRIES, read_range, read_whole, require_ranges, size_of
from fastjepa.data.splits import SPLIT_NAMES, split_chosen
from fastjepa.data.tar_shards import (
    SHARDS_MANIFEST,
    STALE_INDEX,
    ShardIndex,
    TarShards,
    arrays_of,
    fingerprint_in,
    index_in,
    parse_manifest,
    scan_tar,
)
from fastjepa.errors import SplitError, UserError
from fastjepa.files import locked_folder, write_atomic

AT_ONCE = 16  # requests of one process that are waiting for an answer
SCANNERS = 4  # processes that read tars without an index
HEADER_BLOCK = 1 << 22  # bytes that they ask for at a time

ScannedResult = TypeVar("ScannedResult")


class RemoteShards(TarShards):
    """`TarShards` whose tars are remote: the index is here, each `read` is one request."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._asked: dict[int, concurrent.futures.Future] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_asked": {}}  # requests stay in their process

    def ahead(self, samples: Sequence[int]) -> None:
        """Ask for the files of the samples that are read next, AT_ONCE at a time; `read` then waits for its own alone."""
        self._asked = {i: _requests(os.getpid()).submit(self._request, i) for i in samples}

    def read(self, i: int) -> bytes:
        """Return the bytes of image i's file; OSError where they are not there, Unreachable where the server is not."""
        asked = self._asked.pop(i, None)
        return asked.result() if asked else self._request(i)

    def _request(self, i: int) -> bytes:
        number, offset, size = self._places[i].tolist()
        return read_range(self._shards[number], offset, size)


@functools.cache
def _requests(process: int) -> concurrent.futures.ThreadPoolExecutor:
    """Return the threads that wait for answers; each process has its own."""
    return concurrent.futures.ThreadPoolExecutor(AT_ONCE)


def open_directory(where: str, splits: Sequence[str]) -> RemoteShards:
    """Open what `fastjepa data shard` wrote: a directory with the manifest in it, or in the folder of one of `splits`.

    UserError, or FileNotFoundError, naming the address and the remedy, where shards or index are not those of the manifest.
    """
    root = where.rstrip("/")
    names = [name for split in splits for name, named in SPLIT_NAMES.items() if named == split]
    # Images that are in no split count as training images: splits ("train",) look in root and root/train.
    for folder in [root] * (splits[0] == "train") + [f"{root}/{case(name)}" for name in names for case in (str, str.title)]:
        with contextlib.suppress(FileNotFoundError):
            raw = read_whole(f"{folder}/{SHARDS_MANIFEST}")
            break
    else:
        raise SplitError(
            f"{root}: no {SHARDS_MANIFEST} in it or in its {' or '.join(splits)}/; give a directory that "
            f"`fastjepa data shard` wrote, or name the shards of others: {root}/{BRACES}"
        )
    manifest = parse_manifest(raw, f"{folder}/{SHARDS_MANIFEST}")
    if manifest is None or not manifest["shards"]:
        raise UserError(f"{folder}/{SHARDS_MANIFEST}: not of `fastjepa data shard`; name the shards instead: {folder}/{BRACES}")
    with _index_cache(folder, raw) as cache:
        require_ranges(f"{folder}/{manifest['shards'][0]['file']}", manifest["shards"][0]["bytes"])
        indexes = _scan_all("indexes", functools.partial(_written_index, folder, cache), manifest["shards"])
    shards = [f"{folder}/{entry['file']}" for entry in manifest["shards"]]
    return RemoteShards(shards, folder, manifest["classes"], indexes)


def _written_index(folder: str, cache: Path, entry: dict) -> ShardIndex:
    """Return the index of a shard by its entry in the manifest: the kept one, or the remote one if it is that of its tar."""
    tar, kept = f"{folder}/{entry['file']}", cache / f"{hashlib.sha256(entry['file'].encode()).hexdigest()[:16]}.npz"

    def load(file: Path | io.BytesIO, expected: str | None = None) -> ShardIndex:
        index = index_in(arrays_of(file, expected))
        if len(index.members) != entry["images"]:
            raise ValueError(f"{len(index.members)} images, in {SHARDS_MANIFEST} {entry['images']}")
        return index

    with contextlib.suppress(*STALE_INDEX):
        return load(kept)
    url = f"{tar.removesuffix('.tar')}.npz"
    raw, expected = read_whole(url), fingerprint_in(entry["bytes"], functools.partial(read_range, tar, tries=FEW_TRIES))
    try:
        index = load(io.BytesIO(raw), expected)
    except STALE_INDEX as error:
        raise UserError(f"{url}: not the index of the tar beside it ({error}); copy the directory there again") from error
    write_atomic(kept, raw)
    return index


def open_tars(where: str, splits: Sequence[str]) -> RemoteShards:
    """Open tars named by braces, shard-{000000..000009}.tar, without an index: all are read once, and an index is kept here.

    They are the training images, unless their names say several splits: {train,val}-{000..009}.tar.

    UserError, or FileNotFoundError, naming the address and the remedy, where they cannot be had.
    """
    shards = [str(name) for name in split_chosen(expand_braces(where, where), where, splits)]
    if glob := set("*[") & set(where):
        raise UserError(f"{where}: {min(glob)} finds nothing there; name the shards: {BRACES}")
    with _index_cache(where, b"") as cache:
        sizes = _scan_all("sizes", size_of, shards)
        require_ranges(shards[0], sizes[0])
        tars = [(url, size, cache / f"{number:06d}.npz") for number, (url, size) in enumerate(zip(shards, sizes, strict=True))]
        jobs = _scan_all("shards", _scan_job_of, tars)
        _scan_new([job for job in jobs if _kept_index(job) is None], where)
        indexes = [_kept_index(job) for job in jobs]
    return RemoteShards(shards, where, (), indexes)


class ScanJob(NamedTuple):
    """A remote tar, and the path at which its index is kept."""

    url: str
    size: int  # bytes
    fingerprint: str
    kept: Path


def _scan_job_of(tar: tuple[str, int, Path]) -> ScanJob:
    """Return the job of a tar (address, bytes, path of its index) with the fingerprint, for which its end is read."""
    url, size, kept = tar
    return ScanJob(url, size, fingerprint_in(size, functools.partial(read_range, url, tries=FEW_TRIES)), kept)


def _kept_index(job: ScanJob) -> ShardIndex | None:
    """Return the index that is kept of a tar; None where there is none, or that of another tar."""
    with contextlib.suppress(*STALE_INDEX):
        stored = arrays_of(job.kept, job.fingerprint)
        return index_in(stored) if "faults" in stored else None
    return None


def _scan_new(jobs: list[ScanJob], where: str) -> None:
    """Read each tar once, from its beginning to its end, and keep its index."""
    if not jobs:
        return
    total = sum(job.size for job in jobs) / 1e9
    said = "%s: %d tars (%.2f GB) are read once to know where their images lie; that is kept"
    logging.getLogger(__name__).warning(said, where, len(jobs), total)
    with contextlib.closing(map_in_processes(_scan_job, None, jobs, SCANNERS)) as scanned, counting_bar() as progress:
        for _ in progress.track(scanned, total=len(jobs), description="shards read"):
            pass


def _scan_job(_: None, job: ScanJob) -> None:
    """Read a tar from its beginning to its end and keep its index."""
    index = scan_tar(job.url, io.BufferedReader(_RemoteStream(job.url, job.size), HEADER_BLOCK))
    file = io.BytesIO()
    np.savez(file, **vars(index), fingerprint=job.fingerprint)
    write_atomic(job.kept, file.getvalue())


class _RemoteStream(io.RawIOBase):
    """A remote file to be read from its beginning to its end, in the blocks of the buffer around it."""

    def __init__(self, url: str, size: int):
        self._url, self._size, self._at = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer) -> int:
        length = max(0, min(len(buffer), self._size - self._at))
        buffer[:length] = read_range(self._url, self._at, length)
        self._at += length
        return length


@contextlib.contextmanager
def _index_cache(where: str, manifest: bytes) -> Iterator[Path]:
    """Yield the folder that keeps the indexes of these shards, to one process at a time: the ranks of a node share it."""
    key = "-".join(hashlib.sha256(part).hexdigest()[:16] for part in (where.encode(), manifest))
    folder = make_folder(data_dir() / "remote" / key)
    with locked_folder(folder):
        yield folder


def _scan_all(what: str, work: Callable[[object], ScannedResult], items: Sequence) -> list[ScannedResult]:
    """Return work(item) of each item, AT_ONCE at a time, as requests mostly wait; `what` names the bar."""
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as executor, counting_bar() as progress:
        try:
            return list(progress.track(executor.map(work, items), total=len(items), description=what))
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise
