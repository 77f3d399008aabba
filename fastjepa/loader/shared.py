"""Things with tensors, laid in one piece of shared memory on their way between processes."""

import io
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SHARED_MEMORY = Path("/dev/shm")
ALIGNMENT = 64  # bytes, a multiple of every element's size
SPARE_DESCRIPTORS = 4  # for a piece on its way: a copy of its descriptor, a socket, its connection, and one to spare


class SharedMemoryError(OSError):
    """Shared memory that cannot be had; `wanted` is how many bytes were asked for."""

    def __init__(self, code: int, wanted: int):
        super().__init__(code, os.strerror(code), str(SHARED_MEMORY))
        self.wanted = wanted


class Shared(NamedTuple):
    """A thing with its tensors in one piece of shared memory, which travels as one descriptor however many there are.

    Tensors of 3 bytes and of 2 int32 lie at 0 to 3 and at 64 to 72 of 72 bytes.
    """

    memory: Tensor  # (bytes,) uint8
    rest: bytes  # the pickle of all but the tensors: in place of each, where it lies, its dtype and its shape

    def opened(self) -> Any:
        """Return the thing; its tensors are parts of the memory, which nothing is copied out of."""
        return _Opener(self).load()


def share(thing: Any) -> Shared:
    """Return a copy of a thing in shared memory.

    SharedMemoryError where there is too little, OSError where descriptors run out: here, since the queue to the other process
    would tell nobody and lose the thing.
    """
    layout = _Layout()
    layout.dump(thing)
    with spare_descriptors(SPARE_DESCRIPTORS):
        pass
    memory = _shared_bytes(layout.size)
    for start, tensor in layout.tensors:
        memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return Shared(memory, layout.pickled.getvalue())


def _shared_bytes(size: int) -> Tensor:
    """Return (size,) uint8 in shared memory; SharedMemoryError with the errno that torch leaves to its message."""
    try:
        return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(max(size, 1)))
    except RuntimeError as error:
        code = str(error).rpartition("(")[2].rstrip(")\n")  # "... </torch_1_2>: No space left on device (28)"
        if not code.isdigit():
            raise
        raise SharedMemoryError(int(code), size) from error


@contextmanager
def spare_descriptors(count: int) -> Iterator[None]:
    """Hold so many descriptors more; OSError where this process may not open them."""
    with ExitStack() as spare:
        for _ in range(count):
            spare.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        yield


def free_and_total() -> tuple[int, int] | None:
    """Return the free and all bytes of the shared memory; None where the system has no such place."""
    if not SHARED_MEMORY.is_dir():
        return None
    space = shutil.disk_usage(SHARED_MEMORY)
    return space.free, space.total


class _Layout(pickle.Pickler):
    """A pickle that leaves tensors out, and notes where each of them is to lie."""

    def __init__(self):
        self.pickled = io.BytesIO()
        super().__init__(self.pickled, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[tuple[int, Tensor]] = []  # first byte, tensor
        self.size = 0  # bytes

    def persistent_id(self, thing: Any) -> tuple[int, torch.dtype, tuple[int, ...]] | None:
        if not isinstance(thing, Tensor):
            return None
        start = -self.size % ALIGNMENT + self.size
        self.tensors.append((start, thing))
        self.size = start + thing.nbytes
        return start, thing.dtype, tuple(thing.shape)


class _Opener(pickle.Unpickler):
    """The reading of such a pickle."""

    def __init__(self, shared: Shared):
        super().__init__(io.BytesIO(shared.rest))
        self.memory = shared.memory

    def persistent_load(self, place: tuple[int, torch.dtype, tuple[int, ...]]) -> Tensor:
        start, dtype, shape = place
        size = dtype.itemsize * torch.Size(shape).numel()
        return self.memory[start : start + size].view(dtype).view(shape)
