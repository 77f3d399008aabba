"""Packed rows: sequences laid end to end, and the sizes that they may be padded to."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Movable:
    """Tensors that travel together: methods of a tensor, applied to every tensor (or Movable) field."""

    def _map(self, move):
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{name: move(v) if isinstance(v, Tensor | Movable) else v for name, v in moved.items()})

    def to(self, device: torch.device, non_blocking: bool = False):
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        return self._map(lambda tensor: tensor.pin_memory())

    def clone(self):
        return self._map(lambda tensor: tensor.clone())

    def tensors(self) -> Iterator[Tensor]:
        for value in (getattr(self, f.name) for f in fields(self)):
            yield from value.tensors() if isinstance(value, Movable) else [value] if isinstance(value, Tensor) else ()


@dataclass(frozen=True)
class Packed(Movable):
    """Packed rows: S sequences laid end to end in T rows. `length` is the length all sequences share, or None where they
    differ.
    """

    idx: Tensor  # (T,) int32: what each row is a copy of
    cu_seqlens: Tensor  # (S + 1,) int32: sequence s holds rows cu_seqlens[s] to cu_seqlens[s + 1]
    max_len: int
    length: int | None
    mean_len: float = 0.0  # of the sequences, dummies left out; what `of` and `full` fill in

    @classmethod
    def of(cls, idx: np.ndarray, lengths: np.ndarray, at_least: int = 0, dummies: int = 0) -> "Packed":
        """Make it of rows and lengths; `max_len` is the longest, or `at_least` where that is more. The last `dummies` are
        dummies.

        Example: lengths 2, 1 give cu_seqlens 0, 2, 3, max_len 2, length None and mean_len 1.5.
        """
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        longest = max(int(lengths.max(initial=0)), at_least)
        return cls(
            torch.from_numpy(np.ascontiguousarray(idx, dtype=np.int32)),
            torch.from_numpy(cu_seqlens),
            longest,
            longest if len(lengths) and int(lengths.min()) == longest else None,
            float(lengths[: len(lengths) - dummies].mean()) if len(lengths) > dummies else 0.0,
        )


@dataclass(frozen=True)
class Blocks(Movable):
    """Target blocks as the predictor sees them: R*K*b sequences of context rows followed by masked rows."""

    sequences: Packed  # (T,) rows: below `context rows`: that context row; above: position (idx - context rows)
    order: Tensor  # (T,) int32 and
    starts: Tensor  # (context rows + N + 1,) int32: where each distinct row occurs in `sequences`
    queries: Packed  # (Q,) masked rows of every sequence: their place among the T rows
    target_rows: Tensor  # (Q,) int32: the row of the packed target features that each query predicts
    weight: Tensor  # (Q,) fp32: sums to 1 / n_micro over a micro-batch, so that the loss is a mean over images


class PackedSize(NamedTuple):
    """Size of a packed micro-batch, in rows."""

    context: int  # rows of all contexts
    target: int  # rows that the target network finishes
    queries: int  # rows that the predictor finishes
    sequences: int  # rows of the predictor's sequences
    longest_context: int
    longest_block: int
    longest_sequence: int

    @classmethod
    def of(cls, context_mask: np.ndarray, blocks_mask: np.ndarray) -> "PackedSize":
        contexts, blocks = context_mask.sum(axis=2), blocks_mask.sum(axis=2)  # (b, K), (b, R)
        context, queries = int(contexts.sum()), contexts.shape[1] * int(blocks.sum())
        pairs = contexts.max(axis=1, initial=0) + blocks.max(axis=1, initial=0)
        longest = (int(one.max(initial=0)) for one in (contexts, blocks, pairs))
        target = int(blocks_mask.any(axis=1).sum())
        return cls(context, target, queries, blocks.shape[1] * context + queries, *longest)


class PaddingBudget(NamedTuple):
    """Budget of a micro-batch: the size it is padded to, and the dummy sequences that take up what is missing."""

    size: PackedSize
    dummies: int

    def holds(self, found: PackedSize) -> bool:
        """Return whether a micro-batch of that size can be padded to this budget."""
        most = self.size
        lacking = ((most.context - found.context, most.longest_context), (most.queries - found.queries, most.longest_block),
                   (most.sequences - found.sequences, most.longest_sequence))  # fmt: skip
        return all(map(int.__le__, found, most)) and all(rows <= self.dummies * longest for rows, longest in lacking)


def full_sequences(images: int, tokens: int, device: torch.device | None = None) -> Packed:
    """Return every patch of every image: a sequence of `tokens` rows an image, made on the device, which nothing waits for."""
    rows = images * tokens
    idx = torch.arange(rows, dtype=torch.int32, device=device)
    return Packed(idx, torch.arange(0, rows + 1, tokens, dtype=torch.int32, device=device), tokens, tokens, float(tokens))
