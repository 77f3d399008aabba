"""Packed sequences: rows of many images laid end to end, with where each sequence starts.

A micro-batch of b images of N patches is addressed as b*N flat rows (image * N + patch). `pack` turns boolean
masks into everything the networks need, on the host, so that no step ever waits for the device to count rows.
Order is the official one: target block major, then context mask, then image.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from fastjepa_kernels import occurrences


class Movable:
    """Tensors that travel together: `to` and `pin_memory` over every tensor (or Movable) field."""

    def _map(self, move):
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{name: move(v) if isinstance(v, Tensor | Movable) else v for name, v in moved.items()})

    def to(self, device: torch.device, non_blocking: bool = False):
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        return self._map(lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class Packed(Movable):
    """S sequences in T rows. `length` is the length all sequences share, or None where they differ."""

    idx: Tensor  # (T,) int32: what each row is a copy of
    cu_seqlens: Tensor  # (S + 1,) int32: sequence s holds rows cu_seqlens[s] to cu_seqlens[s + 1]
    max_len: int
    length: int | None

    @classmethod
    def of(cls, idx: np.ndarray, lengths: np.ndarray) -> "Packed":
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        longest = int(lengths.max(initial=0))
        return cls(
            torch.from_numpy(np.ascontiguousarray(idx, dtype=np.int32)),
            torch.from_numpy(cu_seqlens),
            longest,
            longest if len(lengths) and int(lengths.min()) == longest else None,
        )


@dataclass(frozen=True)
class Blocks(Movable):
    """The target blocks as the predictor sees them: R*K*b sequences of context rows followed by masked rows."""

    sequences: Packed  # (T,) rows: below `context rows`: that context row; above: position (idx - context rows)
    order: Tensor  # (T,) int32 and
    starts: Tensor  # (context rows + N + 1,) int32: where each distinct row occurs in `sequences`
    queries: Packed  # (Q,) masked rows of every sequence: their place among the T rows
    target_rows: Tensor  # (Q,) int32: the row of the packed target features that each query predicts
    weight: Tensor  # (Q,) fp32: sums to 1 / n_micro over a micro-batch, so that the loss is a mean over images


def full(images: int, tokens: int) -> Packed:
    """Every patch of every image, as (images) sequences of (tokens) rows."""
    return Packed.of(np.arange(images * tokens), np.full(images, tokens))


def pack(context_mask: np.ndarray, target_mask: np.ndarray, images: int | None = None) -> tuple[Packed, Packed, Blocks]:
    """Lay out a micro-batch.

    Args:
        context_mask: (b, K, N) bool, the patches of each context mask (already cut).
        target_mask: (b, R, N) bool, the patches of each target block.
        images: images of the whole optimizer step on this rank, over which the loss is a mean (default b).

    Returns:
        context: K*b sequences (context mask major) of flat patch rows.
        target: b sequences, each image's union of target blocks: the only rows the target network must finish.
        blocks: the predictor's sequences, queries, their targets and loss weights.
    """
    b, n_context, n = context_mask.shape
    n_target = target_mask.shape[1]
    context, context_lengths = _rows(context_mask)
    union = target_mask.any(axis=1)
    target = Packed.of(np.flatnonzero(union), union.sum(axis=1))
    union_row = np.cumsum(union.reshape(-1)) - 1

    target_idx, target_lengths = _rows(target_mask)  # R*b sequences
    context_starts = np.cumsum(context_lengths) - context_lengths
    target_starts = np.cumsum(target_lengths) - target_lengths

    r, k, i = np.meshgrid(np.arange(n_target), np.arange(n_context), np.arange(b), indexing="ij")
    context_seq, target_seq = (k * b + i).reshape(-1), (r * b + i).reshape(-1)
    context_len, query_len = context_lengths[context_seq], target_lengths[target_seq]
    lengths = context_len + query_len
    offset = _ragged_arange(lengths)
    is_query = offset >= np.repeat(context_len, lengths)
    context_row = np.repeat(context_starts[context_seq], lengths) + offset
    target_row = np.repeat(target_starts[target_seq] - context_len, lengths) + offset
    query_flat = target_idx[target_row[is_query]]  # (Q,) flat patch rows
    idx = np.where(is_query, 0, context_row)
    idx[is_query] = len(context) + query_flat % n

    order, starts = occurrences(torch.from_numpy(idx.astype(np.int32)), len(context) + n)
    blocks = Blocks(
        sequences=Packed.of(idx, lengths),
        order=order,
        starts=starts,
        queries=Packed.of(np.flatnonzero(is_query), query_len),
        target_rows=torch.from_numpy(union_row[query_flat].astype(np.int32)),
        weight=torch.from_numpy(
            np.repeat(1.0 / (query_len * len(lengths)), query_len).astype(np.float32) * (b / (images or b))
        ),
    )
    return Packed.of(context, context_lengths), target, blocks


def _rows(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(b, M, N) bool -> flat patch rows of the M*b sequences, mask major, and their lengths."""
    b, _, n = mask.shape
    by_mask = mask.transpose(1, 0, 2)
    _, image, patch = np.nonzero(by_mask)
    return image * n + patch, by_mask.sum(axis=2).reshape(-1)


def _ragged_arange(lengths: np.ndarray) -> np.ndarray:
    """0..lengths[0]-1, 0..lengths[1]-1, ... in one array."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
