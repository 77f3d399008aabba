"""Packed sequences: rows of many images laid end to end, with where each sequence starts.

A micro-batch of b images of N patches is addressed as b*N flat rows (image * N + patch). `pack` turns boolean
masks into everything the networks need, on the host, so that no step ever waits for the device to count rows.
Order is the official one: target block major, then context mask, then image.

Within a Budget every micro-batch has the same shapes. Wanted rows of the target network are filled up with more rows of the
same images; contexts and predictor sequences with dummy sequences at the end, whose queries weigh nothing, so that their
gradients are zeros. No row lies past the last cu_seqlens: attention kernels leave the gradients of such rows undefined.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastjepa_kernels import occurrences


class Movable:
    """Tensors that travel together: the methods of a tensor over every tensor (or Movable) field."""

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
    """S sequences in T rows. `length` is the length all sequences share, or None where they differ."""

    idx: Tensor  # (T,) int32: what each row is a copy of
    cu_seqlens: Tensor  # (S + 1,) int32: sequence s holds rows cu_seqlens[s] to cu_seqlens[s + 1]
    max_len: int
    length: int | None
    mean_len: float = 0.0  # of the sequences, dummies left out; what `of` and `full` fill in

    @classmethod
    def of(cls, idx: np.ndarray, lengths: np.ndarray, at_least: int = 0, dummies: int = 0) -> "Packed":
        """`max_len` is the longest length, or `at_least` where that is more; the last `dummies` sequences are dummies."""
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
    """The target blocks as the predictor sees them: R*K*b sequences of context rows followed by masked rows."""

    sequences: Packed  # (T,) rows: below `context rows`: that context row; above: position (idx - context rows)
    order: Tensor  # (T,) int32 and
    starts: Tensor  # (context rows + N + 1,) int32: where each distinct row occurs in `sequences`
    queries: Packed  # (Q,) masked rows of every sequence: their place among the T rows
    target_rows: Tensor  # (Q,) int32: the row of the packed target features that each query predicts
    weight: Tensor  # (Q,) fp32: sums to 1 / n_micro over a micro-batch, so that the loss is a mean over images


class Size(NamedTuple):
    """How large a packed micro-batch is."""

    context: int  # rows of all contexts
    target: int  # rows that the target network finishes
    queries: int  # rows that the predictor finishes
    sequences: int  # rows of the predictor's sequences
    longest_context: int
    longest_block: int
    longest_sequence: int

    @classmethod
    def of(cls, context_mask: np.ndarray, blocks_mask: np.ndarray) -> "Size":
        contexts, blocks = context_mask.sum(axis=2), blocks_mask.sum(axis=2)  # (b, K), (b, R)
        context, queries = int(contexts.sum()), contexts.shape[1] * int(blocks.sum())
        pairs = contexts.max(axis=1, initial=0) + blocks.max(axis=1, initial=0)
        longest = (int(one.max(initial=0)) for one in (contexts, blocks, pairs))
        target = int(blocks_mask.any(axis=1).sum())
        return cls(context, target, queries, blocks.shape[1] * context + queries, *longest)


class Budget(NamedTuple):
    """What micro-batches are padded to: a size, and the dummy sequences that take up what is missing."""

    size: Size
    dummies: int

    def holds(self, found: Size) -> bool:
        most = self.size
        lacking = ((most.context - found.context, most.longest_context), (most.queries - found.queries, most.longest_block),
                   (most.sequences - found.sequences, most.longest_sequence))  # fmt: skip
        return all(map(int.__le__, found, most)) and all(rows <= self.dummies * longest for rows, longest in lacking)


def full(images: int, tokens: int, device: torch.device | None = None) -> Packed:
    """Every patch of every image, as (images) sequences of (tokens) rows; made on the device, which nothing waits for."""
    rows = images * tokens
    idx = torch.arange(rows, dtype=torch.int32, device=device)
    return Packed(idx, torch.arange(0, rows + 1, tokens, dtype=torch.int32, device=device), tokens, tokens, float(tokens))


def pack(
    context_mask: np.ndarray,
    target_mask: np.ndarray,
    images: int | None = None,
    joint: bool = False,
    budget: Budget | None = None,
    separate: bool = False,
) -> tuple[Packed, Packed, Blocks]:
    """Lay out a micro-batch.

    Args:
        context_mask: (b, K, N) bool, the patches of each context mask (already cut).
        target_mask: (b, R, N) bool, the patches of each target block.
        images: images of the whole optimizer step on this rank, over which the loss is a mean (default b).
        joint: the predictor sees a context once, with the patches of all its blocks (each once, in whichever blocks it is):
            K*b sequences, not R*K*b. A patch weighs what it does in all blocks together.
        budget: what to pad to; a micro-batch that is not within it is left as it is.
        separate: the target network sees every target block by itself; neither with `joint` nor with a budget.

    Returns:
        context: K*b sequences (context mask major) of flat patch rows, then dummies.
        target: b sequences, each image's union of target blocks: the only rows the target network must finish; or, where
            they are separate, R*b sequences, block major.
        blocks: the predictor's sequences, queries, their targets and loss weights.
    """
    blocks_mask, share = _joined(target_mask) if joint else (target_mask, None)
    size = Size.of(context_mask, blocks_mask)
    padded = budget is not None and budget.holds(size)
    size, dummies = budget if padded else (size, 0)
    b, _, n = context_mask.shape
    context, context_lengths = _rows(context_mask)
    idx = np.concatenate([context, np.arange(size.context - len(context)) % (b * n)])
    lengths = np.concatenate([context_lengths, _split(size.context - len(context), dummies)])
    if separate:
        union, target = None, Packed.of(*_rows(target_mask))
    else:
        union = _filled(target_mask.any(axis=1), size.target)
        target = Packed.of(np.flatnonzero(union), union.sum(axis=1), n if padded else 0)
    return (
        Packed.of(idx, lengths, size.longest_context, dummies),
        target,
        _blocks(context_lengths, blocks_mask, union, size, dummies, share, b / (images or b)),
    )


def _blocks(
    context_lengths: np.ndarray, blocks_mask: np.ndarray, union: np.ndarray | None, size: Size, dummies: int,
    share: np.ndarray | None, scale: float,
) -> Blocks:  # fmt: skip
    """`share` (b, N): what a patch counts in the mean of its image, where that is not one over its block's length.

    `union` (b, N): the rows that the target network finishes; None: every block's own.
    """
    b, n_target, n = blocks_mask.shape
    target_idx, target_lengths = _rows(blocks_mask)  # R*b sequences
    context_starts = np.cumsum(context_lengths) - context_lengths
    target_starts = np.cumsum(target_lengths) - target_lengths

    r, k, i = np.meshgrid(np.arange(n_target), np.arange(len(context_lengths) // b), np.arange(b), indexing="ij")
    context_seq, target_seq = (k * b + i).reshape(-1), (r * b + i).reshape(-1)
    context_len, query_len = context_lengths[context_seq], target_lengths[target_seq]
    lengths = context_len + query_len
    offset = _ragged_arange(lengths)
    is_query = offset >= np.repeat(context_len, lengths)
    context_row = np.repeat(context_starts[context_seq], lengths) + offset
    target_row = np.repeat(target_starts[target_seq] - context_len, lengths) + offset
    query_row = target_row[is_query]  # (Q,) of the blocks' rows
    query_flat = target_idx[query_row]  # (Q,) flat patch rows
    idx = np.where(is_query, 0, context_row)
    idx[is_query] = size.context + query_flat % n
    counted = np.repeat(1.0 / (query_len * len(lengths)), query_len)
    weight = counted if share is None else share.reshape(-1)[query_flat] / len(lengths)

    more, unread = size.sequences - len(idx), size.queries - len(query_flat)  # rows of the dummies, and their queries
    dummy_lengths, dummy_queries = _split(more, dummies), _split(unread, dummies)
    is_query = np.append(is_query, _ragged_arange(dummy_lengths) < np.repeat(dummy_queries, dummy_lengths))
    idx = np.append(idx, np.arange(more) % (size.context + n))  # spread: gradients of a row that is repeated are summed in turn
    order, starts = occurrences(torch.from_numpy(idx.astype(np.int32)), size.context + n)
    wanted = query_row if union is None else (np.cumsum(union) - 1)[query_flat]
    return Blocks(
        sequences=Packed.of(idx, np.append(lengths, dummy_lengths), size.longest_sequence, dummies),
        order=order,
        starts=starts,
        queries=Packed.of(np.flatnonzero(is_query), np.append(query_len, dummy_queries), size.longest_block, dummies),
        target_rows=torch.from_numpy(np.append(wanted, np.zeros(unread)).astype(np.int32)),
        weight=torch.from_numpy(np.append(weight.astype(np.float32) * scale, np.zeros(unread, np.float32))),
    )


def _joined(target_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(b, R, N) bool -> the union (b, 1, N), and (b, N) what each patch counts: the mean over blocks of 1 / block length."""
    lengths = target_mask.sum(axis=2, keepdims=True)
    return target_mask.any(axis=1, keepdims=True), (target_mask / np.maximum(lengths, 1)).mean(axis=1)


def _filled(union: np.ndarray, rows: int) -> np.ndarray:
    """(b, N) bool with the first patches that are missing, so that `rows` are there."""
    union = union.copy()
    union.reshape(-1)[np.flatnonzero(~union)[: rows - int(union.sum())]] = True
    return union


def _split(rows: int, parts: int) -> np.ndarray:
    """`rows` in `parts` nearly equal lengths, the longer ones first."""
    return rows // max(parts, 1) + (np.arange(parts) < rows % max(parts, 1))


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
