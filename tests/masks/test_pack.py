"""Packed layouts against a per-image loop, over random masks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.masks.pack import pack
from fastjepa.masks.packed import full_sequences


@st.composite
def mask_pairs(draw):
    b, k, r, n = (draw(st.integers(1, high)) for high in (4, 3, 4, 12))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    context, target = random.random((b, k, n)) < 0.4, random.random((b, r, n)) < 0.4
    target[:, :, 0] |= ~target.any(axis=2)  # a block is never empty
    return context, target


@given(mask_pairs())
def test_every_row_is_where_a_loop_would_put_it(masks):
    context_mask, target_mask = masks
    (b, k, n), r = context_mask.shape, target_mask.shape[1]
    context, target, blocks = pack(context_mask, target_mask)

    contexts = [i * n + np.flatnonzero(context_mask[i, j]) for j in range(k) for i in range(b)]
    assert context.idx.tolist() == np.concatenate(contexts).tolist()
    assert context.cu_seqlens.tolist() == [0, *np.cumsum([len(c) for c in contexts])]
    unions = [i * n + np.flatnonzero(target_mask[i].any(axis=0)) for i in range(b)]
    assert target.idx.tolist() == np.concatenate(unions).tolist()

    row = 0
    where = {flat: at for at, flat in enumerate(context.idx.tolist())} if k == 1 else None
    queries, targets, weights = (
        iter(blocks.queries.idx.tolist()),
        iter(blocks.target_rows.tolist()),
        iter(blocks.weight.tolist()),
    )
    for block in range(r):  # official order: target block, then context mask, then image
        for j in range(k):
            for i in range(b):
                seen = contexts[j * b + i]
                start = int(context.cu_seqlens[j * b + i])
                assert blocks.sequences.idx[row : row + len(seen)].tolist() == list(range(start, start + len(seen)))
                assert where is None or [where[f] for f in seen] == list(range(start, start + len(seen)))
                row += len(seen)
                hidden = np.flatnonzero(target_mask[i, block])
                for patch in hidden:
                    assert blocks.sequences.idx[row] == len(context.idx) + patch
                    assert next(queries) == row
                    assert target.idx[next(targets)] == i * n + patch
                    assert next(weights) == pytest.approx(1 / (r * k * b * len(hidden)), rel=1e-6)
                    row += 1
    assert row == len(blocks.sequences.idx)


@given(mask_pairs())
def test_weights_sum_to_the_share_of_the_step(masks):
    _, _, blocks = pack(*masks, images=8)
    assert blocks.weight.sum().item() == pytest.approx(len(masks[0]) / 8, rel=1e-5)


def test_length_is_known_only_where_all_sequences_share_it():
    mask = np.zeros((2, 1, 6), dtype=bool)
    mask[0, 0, :2] = mask[1, 0, 3:5] = True
    assert pack(mask, mask)[0].length == 2
    mask[1, 0, 5] = True
    context, _, _ = pack(mask, mask)
    assert (context.length, context.max_len) == (None, 3)


def test_full_is_every_patch_of_every_image():
    packed = full_sequences(2, 3)
    assert (packed.idx.tolist(), packed.cu_seqlens.tolist(), packed.length) == ([0, 1, 2, 3, 4, 5], [0, 3, 6], 3)
