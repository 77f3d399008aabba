"""Packing: boolean masks become rows of many images laid end to end, with where each sequence starts.

A micro-batch of b images of N patches is addressed as b*N flat rows (image * N + patch). `pack` turns boolean
masks into everything the networks need, on the host, so that no step ever waits for the device to count rows.
Order is the official one: target block major, then context mask, then image.

Within a budget every micro-batch has the same shapes. Wanted rows of the target network are filled up with more rows of the
same images; contexts and predictor sequences with dummy sequences at the end, whose queries weigh nothing, so that their
gradients are zeros. No row lies past the last cu_seqlens: attention kernels leave the gradients of such rows undefined.
"""

from typing import NamedTuple

import numpy as np
import torch

from fastjepa.masks.packed import Blocks, Packed, PackedSize, PaddingBudget
from fastjepa.masks.packings import PER_BLOCK, PerBlockPacking
from fastjepa_kernels import occurrences


def pack(
    context_mask: np.ndarray,
    target_mask: np.ndarray,
    images: int | None = None,
    packing: PerBlockPacking = PER_BLOCK,
    budget: PaddingBudget | None = None,
) -> tuple[Packed, Packed, Blocks]:
    """Lay out a micro-batch.

    Args:
        context_mask: (b, K, N) bool, the patches of each context mask (already cut).
        target_mask: (b, R, N) bool, the patches of each target block.
        images: images of the whole optimizer step on this rank, over which the loss is a mean (default b).
        packing: what predictor and target network see of the target blocks.
        budget: what to pad to; a micro-batch that is not within it is left as it is. Not with `SEPARATE`.

    Returns:
        context: K*b sequences (context mask major) of flat patch rows, then dummies.
        target: b sequences, each image's union of target blocks: the only rows the target network must finish; or, where
            it sees blocks alone, R*b sequences, block major.
        blocks: the predictor's sequences, queries, their targets and loss weights.

    Example: one image of 6 patches, context {0, 1}, target blocks {3} and {4, 5}.
        context.idx    0 1                cu_seqlens 0 2
        target.idx     3 4 5              cu_seqlens 0 3
        sequences.idx  0 1 5 | 0 1 6 7    cu_seqlens 0 3 7: below 2 a context row, from 2 on position idx - 2
        queries.idx    2 | 5 6            the masked rows among the 7
        target_rows    0 | 1 2            their targets among the 3 rows of target
        weight         1/2 | 1/4 1/4      a block counts 1/2, each of its patches the same
    """
    blocks_mask, share = packing.predicted(target_mask)
    size = PackedSize.of(context_mask, blocks_mask)
    padded = budget is not None and budget.holds(size)
    size, dummies = budget if padded else (size, 0)
    b, _, n = context_mask.shape
    context, context_lengths = _mask_rows(context_mask)
    missing = size.context - len(context)  # rows of the dummies, which repeat the first patches
    idx = np.concatenate([context, np.arange(missing) % (b * n)])
    lengths = np.concatenate([context_lengths, _even_lengths(missing, dummies)])
    union = packing.finished(target_mask)  # (b, N) or None
    if union is None:
        target = Packed.of(*_mask_rows(target_mask))
    else:
        union = _filled_union(union, size.target)
        target = Packed.of(np.flatnonzero(union), union.sum(axis=1), n if padded else 0)
    queries = _queries(context_lengths, blocks_mask, size.context)
    return (
        Packed.of(idx, lengths, size.longest_context, dummies),
        target,
        _predictor_blocks(queries, _target_rows(queries, union), _weights(queries, share, b / (images or b)), size, dummies, n),
    )


class _Queries(NamedTuple):
    """The predictor's sequences before padding: target block major, then context mask, then image."""

    idx: np.ndarray  # (T,) below `context rows` a context row, above it the position of a masked patch
    lengths: np.ndarray  # (R*K*b,) rows of each sequence
    is_query: np.ndarray  # (T,) bool, the masked rows
    query_lengths: np.ndarray  # (R*K*b,) masked rows of each sequence
    row: np.ndarray  # (Q,) each query's row among those of the blocks, laid end to end
    flat: np.ndarray  # (Q,) each query's flat patch row, image * N + patch


def _queries(context_lengths: np.ndarray, blocks_mask: np.ndarray, context_rows: int) -> _Queries:
    """Join every context with every target block of its image.

    Sequence (r, k, i) is context k*b + i followed by block r*b + i. With context lengths (2, 1) and block lengths (3, 1) of
    two images, sequence 0 has the 5 rows: context rows 0, 1 and block rows 0, 1, 2; sequence 1: context row 2, block row 3.
    """
    b, n_target, n = blocks_mask.shape
    target_idx, target_lengths = _mask_rows(blocks_mask)  # R*b sequences
    context_starts = np.cumsum(context_lengths) - context_lengths
    target_starts = np.cumsum(target_lengths) - target_lengths
    r, k, i = np.meshgrid(np.arange(n_target), np.arange(len(context_lengths) // b), np.arange(b), indexing="ij")
    context_seq, target_seq = (k * b + i).reshape(-1), (r * b + i).reshape(-1)  # (R*K*b,)
    context_len, query_len = context_lengths[context_seq], target_lengths[target_seq]
    lengths = context_len + query_len
    offset = _ragged_arange(lengths)  # (T,) place of a row in its sequence
    is_query = offset >= np.repeat(context_len, lengths)
    context_row = np.repeat(context_starts[context_seq], lengths) + offset
    target_row = np.repeat(target_starts[target_seq] - context_len, lengths) + offset
    row = target_row[is_query]
    flat = target_idx[row]
    idx = np.where(is_query, 0, context_row)
    idx[is_query] = context_rows + flat % n
    return _Queries(idx, lengths, is_query, query_len, row, flat)


def _target_rows(queries: _Queries, union: np.ndarray | None) -> np.ndarray:
    """Return the row of the target features that each query predicts: its rank among the rows that are finished.

    Example: of the patches 3, 4 and 9 that are finished, the cumulative sum minus one gives 4 the row 1.
    """
    return queries.row if union is None else (np.cumsum(union) - 1)[queries.flat]


def _weights(queries: _Queries, share: np.ndarray | None, scale: float) -> np.ndarray:
    """Return each query's weight in the loss, fp32; they sum to `scale`, this micro-batch's part of the step's images."""
    sequences = len(queries.lengths)
    if share is None:
        weight = np.repeat(1.0 / (queries.query_lengths * sequences), queries.query_lengths)
    else:
        weight = share.reshape(-1)[queries.flat] / sequences
    return weight.astype(np.float32) * scale


def _predictor_blocks(
    queries: _Queries, target_rows: np.ndarray, weight: np.ndarray, size: PackedSize, dummies: int, tokens: int
) -> Blocks:
    """Pad the predictor's sequences to `size` with dummies, whose queries predict row 0 with weight 0."""
    more, unread = size.sequences - len(queries.idx), size.queries - len(queries.flat)  # rows of the dummies, and their queries
    dummy_lengths, dummy_queries = _even_lengths(more, dummies), _even_lengths(unread, dummies)
    is_query = np.append(queries.is_query, _ragged_arange(dummy_lengths) < np.repeat(dummy_queries, dummy_lengths))
    # Spread over all rows: gradients of a row that is repeated are summed in turn.
    idx = np.append(queries.idx, np.arange(more) % (size.context + tokens))
    order, starts = occurrences(torch.from_numpy(idx.astype(np.int32)), size.context + tokens)
    query_lengths = np.append(queries.query_lengths, dummy_queries)
    return Blocks(
        sequences=Packed.of(idx, np.append(queries.lengths, dummy_lengths), size.longest_sequence, dummies),
        order=order,
        starts=starts,
        queries=Packed.of(np.flatnonzero(is_query), query_lengths, size.longest_block, dummies),
        target_rows=torch.from_numpy(np.append(target_rows, np.zeros(unread)).astype(np.int32)),
        weight=torch.from_numpy(np.append(weight, np.zeros(unread, np.float32))),
    )


def _filled_union(union: np.ndarray, rows: int) -> np.ndarray:
    """Return the (b, N) mask with the first patches that are missing added, so that `rows` are there.

    Example: of 1 0 1 0 0 with 4 rows wanted, 1 1 1 1 0.
    """
    union = union.copy()
    union.reshape(-1)[np.flatnonzero(~union)[: rows - int(union.sum())]] = True
    return union


def _even_lengths(rows: int, parts: int) -> np.ndarray:
    """Return `rows` in `parts` nearly equal lengths, the longer ones first: 7 rows in 3 parts are 3, 2, 2."""
    return rows // max(parts, 1) + (np.arange(parts) < rows % max(parts, 1))


def _mask_rows(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat patch rows of the M*b sequences of a (b, M, N) bool mask, mask major, and their lengths.

    Example: two images of 3 patches with one mask each, 1 0 1 and 0 1 0, give the rows 0, 2, 4 and the lengths 2, 1.
    """
    b, _, n = mask.shape
    by_mask = mask.transpose(1, 0, 2)
    _, image, patch = np.nonzero(by_mask)
    return image * n + patch, by_mask.sum(axis=2).reshape(-1)


def _ragged_arange(lengths: np.ndarray) -> np.ndarray:
    """Return 0..lengths[0]-1, 0..lengths[1]-1, ... in one array: lengths 2, 3 give 0 1 0 1 2."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
