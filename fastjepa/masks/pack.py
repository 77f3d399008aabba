"""Packed sequences: rows of many images laid end to end, with where each sequence starts.

A micro-batch of b images of N patches is addressed as b*N flat rows (image * N + patch). `pack` turns boolean
masks into everything the networks need, on the host, so that no step ever waits for the device to count rows.
Order is the official one: target block major, then context mask, then image.

Within a Budget every micro-batch has the same shapes. Wanted rows of the target network are filled up with more rows of the
same images; contexts and predictor sequences with dummy sequences at the end, whose queries weigh nothing, so that their
gradients are zeros. No row lies past the last cu_seqlens: attention kernels leave the gradients of such rows undefined.
"""

import numpy as np
import torch

from fastjepa.masks.packed import Blocks, Packed, PackedSize, PaddingBudget
from fastjepa_kernels import occurrences


def pack(
    context_mask: np.ndarray,
    target_mask: np.ndarray,
    images: int | None = None,
    joint: bool = False,
    budget: PaddingBudget | None = None,
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
    blocks_mask, share = _joint_masks(target_mask) if joint else (target_mask, None)
    size = PackedSize.of(context_mask, blocks_mask)
    padded = budget is not None and budget.holds(size)
    size, dummies = budget if padded else (size, 0)
    b, _, n = context_mask.shape
    context, context_lengths = _mask_rows(context_mask)
    idx = np.concatenate([context, np.arange(size.context - len(context)) % (b * n)])
    lengths = np.concatenate([context_lengths, _even_lengths(size.context - len(context), dummies)])
    if separate:
        union, target = None, Packed.of(*_mask_rows(target_mask))
    else:
        union = _filled_union(target_mask.any(axis=1), size.target)
        target = Packed.of(np.flatnonzero(union), union.sum(axis=1), n if padded else 0)
    return (
        Packed.of(idx, lengths, size.longest_context, dummies),
        target,
        _predictor_blocks(context_lengths, blocks_mask, union, size, dummies, share, b / (images or b)),
    )


def _predictor_blocks(
    context_lengths: np.ndarray, blocks_mask: np.ndarray, union: np.ndarray | None, size: PackedSize, dummies: int,
    share: np.ndarray | None, scale: float,
) -> Blocks:  # fmt: skip
    """`share` (b, N): what a patch counts in the mean of its image, where that is not one over its block's length.

    `union` (b, N): the rows that the target network finishes; None: every block's own.
    """
    b, n_target, n = blocks_mask.shape
    target_idx, target_lengths = _mask_rows(blocks_mask)  # R*b sequences
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
    dummy_lengths, dummy_queries = _even_lengths(more, dummies), _even_lengths(unread, dummies)
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


def _joint_masks(target_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(b, R, N) bool -> the union (b, 1, N), and (b, N) what each patch counts: the mean over blocks of 1 / block length."""
    lengths = target_mask.sum(axis=2, keepdims=True)
    return target_mask.any(axis=1, keepdims=True), (target_mask / np.maximum(lengths, 1)).mean(axis=1)


def _filled_union(union: np.ndarray, rows: int) -> np.ndarray:
    """(b, N) bool with the first patches that are missing, so that `rows` are there."""
    union = union.copy()
    union.reshape(-1)[np.flatnonzero(~union)[: rows - int(union.sum())]] = True
    return union


def _even_lengths(rows: int, parts: int) -> np.ndarray:
    """`rows` in `parts` nearly equal lengths, the longer ones first."""
    return rows // max(parts, 1) + (np.arange(parts) < rows % max(parts, 1))


def _mask_rows(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(b, M, N) bool -> flat patch rows of the M*b sequences, mask major, and their lengths."""
    b, _, n = mask.shape
    by_mask = mask.transpose(1, 0, 2)
    _, image, patch = np.nonzero(by_mask)
    return image * n + patch, by_mask.sum(axis=2).reshape(-1)


def _ragged_arange(lengths: np.ndarray) -> np.ndarray:
    """0..lengths[0]-1, 0..lengths[1]-1, ... in one array."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
