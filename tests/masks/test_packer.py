"""The packer: what the predictor sees of a context, and what a visible patch counts."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.config.load import config_from_dict
from fastjepa.errors import ConfigError
from fastjepa.masks.distances import distances_to, visible_weights
from fastjepa.masks.draw import draw_masks, draw_seen
from fastjepa.masks.layouts import Masking, Slots
from fastjepa.masks.pack import ContextRows, pack
from fastjepa.masks.packer import Packer
from fastjepa.masks.packings import ContextUse


def config(**sections: dict):
    base = {"data": {"crop_size": [24, 32], "batch_size": 8}, "mask": {"patch_size": 4, "min_keep": 2, "truncate_group": 8}}
    return config_from_dict({name: base.get(name, {}) | sections.get(name, {}) for name in base | sections})


@pytest.mark.parametrize("share", ["image", "batch"])
def test_a_draw_is_a_function_of_seed_step_and_slot(share):
    c = config(mask={"num_enc_masks": 2, "share": share})
    context, _ = draw_masks(Masking(c.mask, c.grid, 3), 5, range(8), 8)

    def drawn(start: int, stop: int, seed: int = 3, step: int = 5) -> np.ndarray:
        return draw_seen(context[start:stop], 0.25, 4, Slots(seed, step, start, stop, share == "batch"))

    whole = drawn(0, 8)
    assert np.array_equal(whole, np.concatenate([drawn(0, 3), drawn(3, 8)]))
    assert not np.array_equal(whole, drawn(0, 8, seed=4)) and not np.array_equal(whole, drawn(0, 8, step=6))
    assert not np.array_equal(whole[:, 0], whole[:, 1]), "draws differ"
    assert (whole[0] == whole[1]).all() == (share == "batch")


@given(seed=st.integers(0, 99), share=st.floats(0.01, 0.99), repeats=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_every_draw_shows_its_share_of_each_context_and_nothing_else(seed, share, repeats):
    context = np.random.default_rng(seed).random((3, 2, 12)) < 0.5
    context[0, 0] = np.arange(12) == 7  # one patch alone is always seen
    seen = draw_seen(context, share, repeats, Slots(seed, 0, 4, 7))
    assert seen.shape == (3, repeats, 2, 12) and not (seen & ~context[:, None]).any()
    wanted = np.maximum(np.rint(share * context.sum(axis=2)), 1) * context.any(axis=2)
    assert (seen.sum(axis=3) == wanted[:, None]).all()


@given(seed=st.integers(0, 99), rows=st.integers(1, 6), columns=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_distances_are_those_of_all_pairs(seed, rows, columns):
    mask = np.random.default_rng(seed).random((3, rows * columns)) < 0.3
    mask[0, -1] = True
    y, x = np.divmod(np.arange(rows * columns), columns)
    pairs = np.hypot(y[:, None] - y, x[:, None] - x)
    expected = np.where(mask[:, None], pairs, np.inf).min(axis=2)
    np.testing.assert_allclose(distances_to(mask, (rows, columns)), expected, rtol=1e-6)
    weights = visible_weights(mask[:, None], (rows, columns), 0.5)
    np.testing.assert_allclose(weights, 0.5 / np.sqrt(np.maximum(expected, 1)), rtol=1e-6)


def test_the_example_of_pack_with_a_draw_and_with_visible_rows():
    """One image of 6 patches, context {0, 1}, target blocks {3} and {4, 5}."""
    context, target, seen = (np.zeros((1, count, 6), bool) for count in (1, 2, 1))
    context[0, 0, :2] = target[0, 0, 3] = target[0, 1, 4:] = seen[0, 0, 1] = True
    _, finished, blocks = pack(context, target, rows=ContextRows(seen[:, None]))
    assert finished.idx.tolist() == [3, 4, 5]
    assert blocks.sequences.idx.tolist() == [1, 5, 1, 6, 7] and blocks.queries.idx.tolist() == [1, 3, 4]
    _, finished, blocks = pack(context, target, rows=ContextRows(visible=np.full((1, 6), 0.5)))
    assert finished.idx.tolist() == [0, 1, 3, 4, 5]
    assert blocks.queries.idx.tolist() == list(range(7)) and blocks.target_rows.tolist() == [0, 1, 2, 0, 1, 3, 4]
    assert blocks.weight.tolist() == [0.125, 0.125, 0.5, 0.125, 0.125, 0.25, 0.25]


def test_the_weight_rises_between_two_shares_of_the_run():
    use = ContextUse(visible_weight=0.5, visible_rise=(0.1, 0.2))
    assert [use.weight(progress) for progress in (0, 0.1, 0.15, 0.2, 1)] == pytest.approx([0, 0, 0.25, 0.5, 0.5])
    at_once = dataclasses.replace(use, visible_rise=(0.0, 0.0))
    assert at_once.weight(0) == 0.5


def test_without_these_keys_the_rows_are_those_of_pack():
    masking = Masking.of(config())
    drawn = draw_masks(masking, 2, range(2, 6), 8)
    for ours, plain in zip(Packer(masking).packed(2, range(2, 6), 8), pack(*drawn), strict=True):
        assert all(map(np.array_equal, ours.tensors(), plain.tensors()))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"meta": {"predictor_repeats": 4}}, "meta.predictor_repeats: 4 draws of a whole context are all the same"),
        ({"meta": {"predictor_context": 0}}, r"meta.predictor_context: 0.0 must be in \(0, 1\]"),
        (
            {"meta": {"predictor_context": 0.5}, "runtime": {"cuda_graph": True}},
            "padding knows no meta.predictor_context",
        ),
        (
            {"loss": {"visible_weight": 0.5}, "runtime": {"cuda_graph": True}},
            "padding knows no loss.visible_weight",
        ),
        ({"loss": {"visible_weight": 0.5, "target": "input"}}, "loss.visible_weight: loss.target input shows"),
        ({"loss": {"visible_rise": [0.5, 0.1]}}, "loss.visible_rise: .* must be two rising numbers"),
    ],
)
def test_what_cannot_be_is_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        config(**sections)
