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


class ContextRows(NamedTuple):
    """Context rows as the predictor meets them, where it does not see all of them, once, without predicting them."""

    seen: np.ndarray | None = None  # (b, M, K, N) bool, the context patches of each of M draws; None: all of them, once
    visible: np.ndarray | None = None  # (b, N) what a context patch counts where a masked one counts 1; None: not predicted


WHOLE = ContextRows()


def pack(
    context_mask: np.ndarray,
    target_mask: np.ndarray,
    images: int | None = None,
    packing: PerBlockPacking = PER_BLOCK,
    budget: PaddingBudget | None = None,
    rows: ContextRows = WHOLE,
) -> tuple[Packed, Packed, Blocks]:
    """Lay out a micro-batch.

    Args:
        context_mask: (b, K, N) bool, the patches of each context mask (already cut).
        target_mask: (b, R, N) bool, the patches of each target block.
        images: images of the whole optimizer step on this rank, over which the loss is a mean (default b).
        packing: what predictor and target network see of the target blocks.
        budget: what to pad to; a micro-batch that is not within it is left as it is. Not with `SEPARATE` or other rows.
        rows: what the predictor sees of a context, and whether it predicts that too, not with `SEPARATE`. M draws make M
            sequences of one: block major, then draw, context mask and image. Context rows that are predicted are queries
            of every sequence that they are in.

    Returns:
        context: K*b sequences (context mask major) of flat patch rows, then dummies.
        target: b sequences, each image's union of what is predicted: the only rows the target network must finish; or,
            where it sees blocks alone, R*b sequences, block major.
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
    b, _, n = context_mask.shape
    padded = budget is not None and budget.holds(PackedSize.of(context_mask, blocks_mask))
    context, context_lengths = _mask_rows(context_mask)
    seen = _seen_rows(context_mask, rows.seen)
    union = packing.finished(target_mask)  # (b, N) or None
    if rows.visible is not None:
        union.reshape(-1)[seen.flat] = True
    queries = _queries(seen, blocks_mask, budget.size.context if padded else len(context), rows.visible is not None)
    size, dummies = budget if padded else (_own_size(len(context), union, queries), 0)
    missing = size.context - len(context)  # rows of the dummies, which repeat the first patches
    idx = np.concatenate([context, np.arange(missing) % (b * n)])
    lengths = np.concatenate([context_lengths, _even_lengths(missing, dummies)])
    if union is None:
        target = Packed.of(*_mask_rows(target_mask))
    else:
        union = _filled_union(union, size.target)
        target = Packed.of(np.flatnonzero(union), union.sum(axis=1), n if padded else 0)
    weight = _weights(queries, share, rows.visible, b / (images or b))
    return (
        Packed.of(idx, lengths, size.longest_context, dummies),
        target,
        _predictor_blocks(queries, _target_rows(queries, union), weight, size, dummies, n),
    )


class _Seen(NamedTuple):
    """Context rows that the predictor sees: draw major, then context mask, then image."""

    row: np.ndarray  # (S,) rows of the packed contexts
    flat: np.ndarray  # (S,) their flat patch rows, image * N + patch
    lengths: np.ndarray  # (M*K*b,) how many there are of each context


def _seen_rows(context_mask: np.ndarray, seen: np.ndarray | None) -> _Seen:
    """Return the rows of all contexts, or of those patches (b, M, K, N) of them that each draw shows.

    Example: one context of the patches 1, 4 and 5, its rows 0, 1 and 2. Draws of 1, 5 and of 4 show the rows 0, 2 | 1.
    """
    flat, lengths = _mask_rows(context_mask)
    if seen is None:
        return _Seen(np.arange(len(flat)), flat, lengths)
    b, draws, contexts, n = seen.shape
    by_mask = context_mask.transpose(1, 0, 2)  # (K, b, N), as contexts are packed
    number = (np.cumsum(by_mask) - 1).reshape(by_mask.shape).transpose(1, 0, 2)  # (b, K, N): a patch's row
    flat, lengths = _mask_rows(seen.reshape(b, draws * contexts, n))
    which = np.repeat(np.arange(draws * contexts * b) // b % contexts, lengths)  # the context mask of each row
    return _Seen(number[flat // n, which, flat % n], flat, lengths)


def _own_size(context: int, union: np.ndarray | None, queries: "_Queries") -> PackedSize:
    """Return the size of a micro-batch that is not padded; its longest sequences are left to be found."""
    target = 0 if union is None else int(union.sum())
    return PackedSize(context, target, len(queries.flat), len(queries.idx), 0, 0, 0)


class _Queries(NamedTuple):
    """The predictor's sequences before padding: target block major, then draw, context mask and image."""

    idx: np.ndarray  # (T,) below `context rows` a context row, above it the position of a masked patch
    lengths: np.ndarray  # (R*M*K*b,) rows of each sequence
    masked_lengths: np.ndarray  # (R*M*K*b,) masked rows of each sequence
    is_query: np.ndarray  # (T,) bool, the rows that are predicted: masked ones, or all
    masked: np.ndarray  # (Q,) bool, the masked ones among the queries
    row: np.ndarray  # each masked row's row among those of the blocks, laid end to end
    flat: np.ndarray  # (Q,) each query's flat patch row, image * N + patch

    @property
    def query_lengths(self) -> np.ndarray:
        """Return how many queries each sequence has, (R*M*K*b,)."""
        return self.masked_lengths if self.masked.all() else self.lengths


def _queries(seen: _Seen, blocks_mask: np.ndarray, context_rows: int, visible: bool) -> _Queries:
    """Join every context, as each draw shows it, with every target block of its image; `visible`: all rows are predicted.

    Sequence (r, k, i) is context k*b + i followed by block r*b + i. With context lengths (2, 1) and block lengths (3, 1) of
    two images, sequence 0 has the 5 rows: context rows 0, 1 and block rows 0, 1, 2; sequence 1: context row 2, block row 3.
    """
    b, n_target, n = blocks_mask.shape
    target_idx, target_lengths = _mask_rows(blocks_mask)  # R*b sequences
    context_starts = np.cumsum(seen.lengths) - seen.lengths
    target_starts = np.cumsum(target_lengths) - target_lengths
    r, k, i = np.meshgrid(np.arange(n_target), np.arange(len(seen.lengths) // b), np.arange(b), indexing="ij")
    context_seq, target_seq = (k * b + i).reshape(-1), (r * b + i).reshape(-1)  # (R*M*K*b,)
    context_len, masked_len = seen.lengths[context_seq], target_lengths[target_seq]
    lengths = context_len + masked_len
    offset = _ragged_arange(lengths)  # (T,) place of a row in its sequence
    masked = offset >= np.repeat(context_len, lengths)
    context_row = (np.repeat(context_starts[context_seq], lengths) + offset)[~masked]
    row = (np.repeat(target_starts[target_seq] - context_len, lengths) + offset)[masked]
    idx, flat = np.empty(len(masked), np.int64), np.empty(len(masked), np.int64)
    idx[~masked], flat[~masked] = seen.row[context_row], seen.flat[context_row]
    flat[masked] = target_idx[row]
    idx[masked] = context_rows + flat[masked] % n
    is_query = np.ones_like(masked) if visible else masked
    return _Queries(idx, lengths, masked_len, is_query, masked[is_query], row, flat[is_query])


def _target_rows(queries: _Queries, union: np.ndarray | None) -> np.ndarray:
    """Return the row of the target features that each query predicts: its rank among the rows that are finished.

    Example: of the patches 3, 4 and 9 that are finished, the cumulative sum minus one gives 4 the row 1.
    """
    return queries.row if union is None else (np.cumsum(union) - 1)[queries.flat]


def _weights(queries: _Queries, share: np.ndarray | None, visible: np.ndarray | None, scale: float) -> np.ndarray:
    """Return each query's weight in the loss, fp32; those of masked rows sum to `scale`, this micro-batch's part of the step.

    The visible rows of a sequence count as much as its masked ones, times `visible`: of 4 visible rows each has the weight of
    a fourth of the sequence times its own (b, N) number.
    """
    sequences, counts = len(queries.lengths), queries.query_lengths
    if share is None:
        weight = np.repeat(1.0 / (queries.masked_lengths * sequences), counts)
    else:
        weight = share.reshape(-1)[queries.flat] / sequences
    if visible is not None:
        even = np.repeat(1.0 / np.maximum((queries.lengths - queries.masked_lengths) * sequences, 1), counts)
        weight = np.where(queries.masked, weight, visible.reshape(-1)[queries.flat] * even)
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
