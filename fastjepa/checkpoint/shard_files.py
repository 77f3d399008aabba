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

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastjepa.ranks.shard import SAFETENSORS_DTYPES, Piece, TensorForm, element_count


def shard_name(group: str, rank: int, world: int) -> str:
    return f"{group}-{rank:05d}-of-{world:05d}.safetensors"


def write_shard_file(file: Path, pieces: Mapping[str, Piece], rank: int) -> None:
    """This rank's pieces of one group; what every rank has is written by rank 0."""
    tensors, shapes = {}, {}
    for name, piece in pieces.items():
        if not piece.everywhere:
            tensors[f"{name}@{piece.start}"], shapes[name] = piece.tensor.detach().contiguous(), piece.shape
        elif rank == 0:
            tensors[name] = piece.tensor.detach().clone().contiguous()  # counters may share their memory
    save_file(tensors, file, {"shapes": json.dumps(shapes)})


class StoredGroup:
    """A group of tensors in a checkpoint, whole or in pieces, read as they are asked for.

    Raises:
        SafetensorError, OSError: files that are not there, cannot be read, or leave a tensor incomplete.
    """

    def __init__(self, directory: Path, group: str):
        self.group, self._open = group, ExitStack()
        self.forms: dict[str, TensorForm] = {}
        self._parts: dict[str, list[tuple[int, int, safe_open, str]]] = {}  # start, numel, file, key
        whole = directory / f"{group}.safetensors"
        self.files = [whole] if whole.is_file() else sorted(directory.glob(f"{group}-*-of-*.safetensors"))
        if not self.files:
            raise FileNotFoundError(2, "no such file", str(whole))
        for file in self.files:
            self._index(self._open.enter_context(safe_open(file, "pt")))
        for name, (_, shape) in self.forms.items():
            if sum(part[1] for part in self._parts[name]) != element_count(shape):
                raise SafetensorError(f"{group}: {name} is not whole in {len(self.files)} files")

    def _index(self, file: safe_open) -> None:
        shapes = json.loads((file.metadata() or {}).get("shapes", "{}"))
        for key in file.keys():  # noqa: SIM118 (a handle, not a dict)
            name, _, start = key.partition("@")
            part = file.get_slice(key)
            shape = tuple(shapes[name] if start else part.get_shape())
            self.forms[name] = part.get_dtype(), shape
            self._parts.setdefault(name, []).append((int(start or 0), element_count(part.get_shape()), file, key))

    def __enter__(self) -> "StoredGroup":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def read(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """`count` elements of the flattened tensor from `start` on; all of them, in the tensor's shape, without a count."""
        kind, shape = self.forms[name]
        parts = sorted(self._parts[name], key=lambda part: part[0])
        if count is None and len(parts) == 1:
            return parts[0][2].get_tensor(parts[0][3]).view(shape)
        end = element_count(shape) if count is None else start + count
        out = torch.empty(end - start, dtype=SAFETENSORS_DTYPES[kind])
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
        stored = [stack.enter_context(StoredGroup(directory, group)) for group in groups]
        header, end = {"__metadata__": dict(metadata)}, 0
        for group in stored:
            for name, (kind, shape) in group.forms.items():
                begun, end = end, end + element_count(shape) * SAFETENSORS_DTYPES[kind].itemsize
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
