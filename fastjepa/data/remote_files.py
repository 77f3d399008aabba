"""Files behind https:// or s3://, read whole or in parts through fsspec.

A failure that may pass is tried again; any other becomes one sentence.
"""

import functools
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from fastjepa.errors import UserError

SCHEMES = "https", "http", "s3"
TIMEOUT = 30  # seconds until a request counts as failed
# Tries of a request, before a run and in it; the waits between them double: 0.5 + 1 = 1.5 s in all, and two minutes.
FEW_TRIES, MANY_TRIES = 3, 9
FIRST_WAIT = 0.5  # seconds

RemoteResult = TypeVar("RemoteResult")


class Unreachable(UserError):
    """A file that cannot be reached, for a reason that is not the file's; in a run no substitute may hide it."""

    def __init__(self, said: str):
        super().__init__(said.strip().rpartition("\n")[2].removeprefix(f"{__name__}.Unreachable: "))  # torch adds a traceback


def is_remote(where: str) -> bool:
    """Return whether a data source is an address; UserError for an address of a kind that cannot be read."""
    if where.startswith("pipe:"):
        raise UserError(f"{where}: no command is run to read data; give an address, https:// or s3://, or a directory")
    if "://" not in where:
        return False
    parts = urlsplit(where)
    if parts.scheme not in SCHEMES:
        raise UserError(f"{where}: shards are read from https:// and s3://; give such an address, or a directory")
    if parts.query or parts.fragment or parts.username:
        plain = f"{parts.scheme}://{parts.hostname}{parts.path}"
        raise UserError(f"{plain}: give it without login, ? and #, as files are found below it and it is logged; a login "
                          "belongs into ~/.netrc, for s3 see AWS_PROFILE")  # fmt: skip
    return True


def read_whole(url: str) -> bytes:
    """Return a file's bytes. FileNotFoundError or Unreachable, as from every function here."""
    return _ask_store(url, FEW_TRIES, lambda files: files.cat_file(url, timeout=TIMEOUT))


def size_of(url: str) -> int:
    """Return a file's size in bytes."""
    found = _ask_store(url, FEW_TRIES, lambda files: files.info(url, timeout=TIMEOUT))
    if found.get("size") is None:
        raise Unreachable(f"{url}: the server does not say how large it is; copy the shards to a local disk")
    return found["size"]


def read_range(url: str, offset: int, size: int, tries: int = MANY_TRIES) -> bytes:
    """Return a range of a file's bytes; OSError, which makes a bad image of it, where the file is gone or ends before."""
    if not size:
        return b""
    raw = _ask_store(url, tries, lambda files: files.cat_file(url, start=offset, end=offset + size, timeout=TIMEOUT))
    if len(raw) > size:
        raise _no_ranges(url)
    if len(raw) < size:
        raise OSError(f"{url}: {len(raw)} bytes where its index has {size} at {offset}; it was replaced or cut")
    return raw


def require_ranges(url: str, size: int) -> None:
    """Raise Unreachable for a server that would send all `size` bytes of a file for some, found without receiving them."""

    def sends_parts(files) -> bool:
        with files.open(url, "rb", size=size, cache_type="none") as file:
            file.seek(size - 1)
            try:
                return len(file.read(1)) == 1
            except ValueError:  # fsspec's, before it receives a whole file
                return False

    if not url.startswith("s3:") and size > 1 and not _ask_store(url, FEW_TRIES, sends_parts):
        raise _no_ranges(url)


def _no_ranges(url: str) -> Unreachable:
    return Unreachable(f"{url}: its server sends whole files where parts are asked for (no HTTP Range); "
                       "serve the shards by another (nginx, Apache, S3), or copy them to a local disk")  # fmt: skip


@functools.cache
def _filesystem(scheme: str, process: int):
    """Return fsspec's file system for a scheme, one a process.

    A process cannot use the connections of the one that it was forked from. Nor may it close them, which would disturb the
    event loop there: hence a cache for ever.
    """
    options = {} if scheme == "s3" else {"client_kwargs": {"trust_env": True}}  # proxies and ~/.netrc
    try:
        import fsspec

        return fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError as error:
        raise UserError(f"{scheme}:// needs fsspec; run: pip install 'fastjepa[remote]'") from error


def _ask_store(url: str, tries: int, request: Callable[..., RemoteResult]) -> RemoteResult:
    """Return request(file system), asked again after failures that may pass."""
    files = _filesystem(urlsplit(url).scheme, os.getpid())
    for attempt in range(tries):
        try:
            return request(files)
        except Exception as error:  # those of aiohttp, botocore and asyncio have no class in common
            final = _is_final(url, error)
            if final or attempt + 1 == tries:
                said = "no answer" if isinstance(error, TimeoutError) else " ".join(str(error).split()) or type(error).__name__
                raise final or Unreachable(
                    f"{url}: cannot be read, tried {tries} times ({said}); mend the address or the network and run again"
                ) from error
            # The workers of all ranks met the fault together, and must not come back together.
            time.sleep(FIRST_WAIT * 2**attempt * random.SystemRandom().uniform(0.5, 1))


def _is_final(url: str, error: Exception) -> Exception | None:
    """Return the exception that a failed request is to raise; None where another try may help."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None and not hasattr(error.__cause__, "response"):
        error = error.__cause__  # fsspec gives that name to whatever keeps it from the size of a file on http
    status = getattr(error, "status", None)
    if status == 404 or isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{url}: not there")
    if status in (401, 403, 407) or isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
        return Unreachable(f"{url}: access denied; for https write the login into ~/.netrc, for s3 set AWS_PROFILE, or "
                           "FSSPEC_S3_ANON=true for a public bucket")  # fmt: skip
    if status == 416 or "range is not satisfiable" in str(error):  # https, s3
        return OSError(f"{url}: ends before what its index says; it was replaced or cut")
    if status in range(400, 500) and status not in (408, 425, 429):
        return Unreachable(f"{url}: refused by the server ({status} {error.message}); give the address of shards")
    return None
