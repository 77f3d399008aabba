"""Padding: the one shape that micro-batches are padded to for a CUDA graph, from what masks hold."""

import functools

import numpy as np

from fastjepa.masks.draw import draw_masks
from fastjepa.masks.layouts import Masking
from fastjepa.masks.packed import PackedSize, PaddingBudget

BUDGET_DRAWS = 1000


@functools.cache
def padding_budget(masking: Masking, total: int, micro_batch: int, given: tuple[int, int, int] | None = None) -> PaddingBudget:
    """Return the budget of micro-batches of a global batch of `total` images.

    Rows are those `given` (runtime.token_budget) or, for each count, the most that BUDGET_DRAWS steps draw: about one
    micro-batch in BUDGET_DRAWS / 3 is then over it. Dummies are as many as the smallest of those micro-batches needs.
    """
    sizes = drawn_sizes(masking, total, micro_batch)
    least, most = (PackedSize(*map(int, extreme)) for extreme in (sizes.min(axis=0), sizes.max(axis=0)))
    context, target, queries = given or most[:3]
    blocks = masking.packing.predictor_sequences(masking.mask.target_blocks)
    size = most._replace(context=context, target=target, queries=queries, sequences=blocks * context + queries)
    lacking = ((size.context - least.context, size.longest_context), (size.queries - least.queries, size.longest_block),
               (size.sequences - least.sequences, size.longest_sequence))  # fmt: skip
    return PaddingBudget(size, max(0, *(-(-rows // longest) for rows, longest in lacking)))


@functools.cache
def drawn_sizes(masking: Masking, total: int, micro_batch: int) -> np.ndarray:
    """Return the sizes of the first micro-batch of each step, (BUDGET_DRAWS, 7)."""
    pairs = (draw_masks(masking, step, range(micro_batch), total) for step in range(BUDGET_DRAWS))
    return np.array([PackedSize.of(context, masking.packing.predicted(target)[0]) for context, target in pairs])
