"""Tensors in pieces: the file that a rank writes of a sharded state, and a checkpoint's files read a range at a time.

A whole state lies in "<group>.safetensors", each tensor under its name. Where ranks share a state, rank r of w writes
"<group>-<r>-of-<w>.safetensors": 1-d pieces under "<name>@<start>", their tensors' shapes in the file's metadata, and
on rank 0 what every rank has, under its name.

Example: a weight "proj.weight" of shape (2, 5), which rank 0 has up to element 6 of its 10 and rank 1 from there:

    encoder-00000-of-00002.safetensors   "proj.weight@0" (6,)   shapes {"proj.weight": [2, 5]}
    encoder-00001-of-00002.safetensors   "proj.weight@6" (4,)   shapes {"proj.weight": [2, 5]}
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastjepa.ranks.shard import SAFETENSORS_DTYPES, Piece, TensorForm, element_count


def shard_name(group: str, rank: int, world: int) -> str:
    """Return the name of a rank's file of a group, such as "encoder-00001-of-00004.safetensors"."""
    return f"{group}-{rank:05d}-of-{world:05d}.safetensors"


def write_shard_file(file: Path, pieces: Mapping[str, Piece], rank: int) -> None:
    """Write this rank's pieces of one group; what every rank has is written by rank 0."""
    tensors, shapes = {}, {}
    for name, piece in pieces.items():
        if not piece.everywhere:
            tensors[f"{name}@{piece.start}"], shapes[name] = piece.tensor.detach().contiguous(), piece.shape
        elif rank == 0:
            tensors[name] = piece.tensor.detach().clone().contiguous()  # counters may share their memory
    save_file(tensors, file, {"shapes": json.dumps(shapes)})


class StoredGroup:
    """A group of tensors in a checkpoint, whole or in pieces, read as they are asked for; a context that closes its files.

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
        """Note the forms of a file's tensors, and where its pieces lie in them."""
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
        """Return `count` elements of the flattened tensor from `start` on; without a count the tensor in its shape.

        Each stored piece gives what it has of the range. Elements 4 to 8 of a tensor stored as 0 to 5 and 6 to 9 are the
        places 4 and 5 of the first piece and 0 to 2 of the second: places low - first to high - first of each.
        """
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
