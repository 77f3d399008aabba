"""Tensors in pieces: what one rank keeps of a sharded state, and a checkpoint's files read a range at a time.

A whole state lies in "<group>.safetensors", each tensor under its name. Where ranks share a state, rank r of w writes
"<group>-<r>-of-<w>.safetensors": 1-d pieces under "<name>@<start>", their tensors' shapes in the file's metadata, and
on rank 0 what every rank has, under its name.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Form = tuple[str, tuple[int, ...]]  # dtype as safetensors names it, and shape

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Piece(NamedTuple):
    """A rank's part of a tensor, as a view of what trains: writing to it changes the run."""

    tensor: Tensor  # (n,) of the flattened tensor from `start`; the tensor itself where every rank has all of it
    start: int
    shape: tuple[int, ...]  # of the whole tensor
    everywhere: bool = False  # whether every rank has all of it

    @classmethod
    def all_of(cls, tensor: Tensor) -> "Piece":
        return cls(tensor, 0, tuple(tensor.shape), everywhere=True)

    @property
    def form(self) -> Form:
        return NAMES[self.tensor.dtype], self.shape


def shard_name(group: str, rank: int, world: int) -> str:
    return f"{group}-{rank:05d}-of-{world:05d}.safetensors"


def write(file: Path, pieces: Mapping[str, Piece], rank: int) -> None:
    """This rank's pieces of one group; what every rank has is written by rank 0."""
    tensors, shapes = {}, {}
    for name, piece in pieces.items():
        if not piece.everywhere:
            tensors[f"{name}@{piece.start}"], shapes[name] = piece.tensor.detach().contiguous(), piece.shape
        elif rank == 0:
            tensors[name] = piece.tensor.detach().clone().contiguous()  # counters may share their memory
    save_file(tensors, file, {"shapes": json.dumps(shapes)})


class Stored:
    """A group of tensors in a checkpoint, whole or in pieces, read as they are asked for.

    Raises:
        SafetensorError, OSError: files that are not there, cannot be read, or leave a tensor incomplete.
    """

    def __init__(self, directory: Path, group: str):
        self.group, self._open = group, ExitStack()
        self.forms: dict[str, Form] = {}
        self._parts: dict[str, list[tuple[int, int, safe_open, str]]] = {}  # start, numel, file, key
        whole = directory / f"{group}.safetensors"
        self.files = [whole] if whole.is_file() else sorted(directory.glob(f"{group}-*-of-*.safetensors"))
        if not self.files:
            raise FileNotFoundError(2, "no such file", str(whole))
        for file in self.files:
            self._index(self._open.enter_context(safe_open(file, "pt")))
        for name, (_, shape) in self.forms.items():
            if sum(part[1] for part in self._parts[name]) != _count(shape):
                raise SafetensorError(f"{group}: {name} is not whole in {len(self.files)} files")

    def _index(self, file: safe_open) -> None:
        shapes = json.loads((file.metadata() or {}).get("shapes", "{}"))
        for key in file.keys():  # noqa: SIM118 (a handle, not a dict)
            name, _, start = key.partition("@")
            part = file.get_slice(key)
            shape = tuple(shapes[name] if start else part.get_shape())
            self.forms[name] = part.get_dtype(), shape
            self._parts.setdefault(name, []).append((int(start or 0), _count(part.get_shape()), file, key))

    def __enter__(self) -> "Stored":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def read(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """`count` elements of the flattened tensor from `start` on; all of them, in the tensor's shape, without a count."""
        kind, shape = self.forms[name]
        parts = sorted(self._parts[name], key=lambda part: part[0])
        if count is None and len(parts) == 1:
            return parts[0][2].get_tensor(parts[0][3]).view(shape)
        end = _count(shape) if count is None else start + count
        out = torch.empty(end - start, dtype=DTYPES[kind])
        for first, numel, file, key in parts:
            low, high = max(first, start), min(first + numel, end)
            if low < high:
                flat = (
                    file.get_slice(key)[low - first : high - first] if "@" in key else file.get_tensor(key).view(-1)[low:high]
                )
                out[low - start : high - start] = flat
        return out.view(shape) if count is None else out

    def fill(self, name: str, piece: Piece) -> None:
        """Copy this tensor's values into a piece of it."""
        piece.tensor.copy_(self.read(name) if piece.everywhere else self.read(name, piece.start, piece.tensor.numel()))


def consolidate(directory: Path, groups: Iterable[str], file: Path, metadata: Mapping[str, str]) -> None:
    """One safetensors file of whole tensors named "<group>.<name>", holding one tensor at a time in memory."""
    hidden = file.with_name(f".{file.name}.{os.getpid()}")
    with ExitStack() as stack:
        stored = [stack.enter_context(Stored(directory, group)) for group in groups]
        header, end = {"__metadata__": dict(metadata)}, 0
        for group in stored:
            for name, (kind, shape) in group.forms.items():
                begun, end = end, end + _count(shape) * DTYPES[kind].itemsize
                header[f"{group.group}.{name}"] = {"dtype": kind, "shape": shape, "data_offsets": [begun, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # data start aligned
        try:
            with hidden.open("wb") as out:
                out.write(len(text).to_bytes(8, "little") + text)
                for group in stored:
                    for name in group.forms:
                        out.write(group.read(name).contiguous().view(-1).view(torch.uint8).numpy().data)
                out.flush()
                os.fsync(out.fileno())
            os.replace(hidden, file)
        finally:
            hidden.unlink(missing_ok=True)


def _count(shape: Iterable[int]) -> int:
    return torch.Size(shape).numel()
