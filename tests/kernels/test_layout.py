"""Index maths of the kernels over random cases: where rows occur, and the layout that the trainer's packing builds."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.masks.pack import pack
from fastjepa.masks.packed import Packed
from fastjepa_kernels import occurrences, predictor_layout


@st.composite
def mask_pairs(draw):
    b, k, r, n = (draw(st.integers(1, high)) for high in (4, 3, 4, 12))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    context, target = random.random((b, k, n)) < 0.4, random.random((b, r, n)) < 0.4
    target[:, :, 0] |= ~target.any(axis=2)  # a block is never empty
    return context, target


def target_blocks(target_mask: np.ndarray) -> Packed:
    """Turn (b, R, N) bool into the positions of the R*b target blocks, block major."""
    by_block = target_mask.transpose(1, 0, 2)
    return Packed.of(np.nonzero(by_block)[2], by_block.sum(axis=2).reshape(-1))


@given(mask_pairs())
def test_the_layout_is_the_one_that_pack_builds(masks):
    context_mask, target_mask = masks
    context, _, blocks = pack(context_mask, target_mask)
    targets = target_blocks(target_mask)
    idx, cu_seqlens = predictor_layout(context.cu_seqlens, targets.idx, targets.cu_seqlens, len(context_mask), len(context.idx))
    torch.testing.assert_close(idx, blocks.sequences.idx, rtol=0, atol=0)
    torch.testing.assert_close(cu_seqlens, blocks.sequences.cu_seqlens, rtol=0, atol=0)


@settings(max_examples=50)
@given(
    st.integers(0, 20).flatmap(
        lambda rows: st.tuples(st.just(rows), st.lists(st.integers(0, max(rows - 1, 0)), max_size=30 if rows else 0))
    )
)
def test_occurrences_invert_the_index(case):
    rows, values = case
    order, starts = occurrences(torch.tensor(values, dtype=torch.int32), rows)
    assert order.dtype == starts.dtype == torch.int32
    for row in range(rows):
        assert order[starts[row] : starts[row + 1]].tolist() == [t for t, value in enumerate(values) if value == row]
