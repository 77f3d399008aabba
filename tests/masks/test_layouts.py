"""Masks beside multi-block, the paper's ablation: shares, disjointness, purity in (seed, step, slot); and shared masks."""

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fastjepa.config.schema import Config, MaskConfig
from fastjepa.errors import ConfigError
from fastjepa.masks.draw import draw_masks
from fastjepa.masks.layouts import Masking, fewest_patches
from tests.support.drawing import GRID, boxes, check, draw, lengths, settings, statistics

OTHERS = ("block", "rasterized", "random")
grids = st.tuples(st.integers(2, 20), st.integers(2, 20))
any_mask = st.builds(
    MaskConfig,
    strategy=st.sampled_from(OTHERS),
    share=st.sampled_from(["image", "batch"]),
    aspect_ratio=st.tuples(st.floats(0.3, 1), st.floats(1, 3)),
    truncate=st.sampled_from(["batch_min", "none", "fraction"]),
    truncate_group=st.integers(1, 40),
)


def of(strategy: str, **more: object) -> MaskConfig:
    return MaskConfig(strategy=strategy, truncate="none", **more)


@given(any_mask, grids, st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.lists(st.integers(0, 60), min_size=3, max_size=3))
def test_any_range_of_slots_is_the_slice_of_the_whole(mask: MaskConfig, grid, seed: int, step: int, places: list[int]):
    start, stop, total = sorted(places)
    whole = draw_masks(Masking(mask, grid, seed), step, range(total), total)
    part = draw_masks(Masking(mask, grid, seed), step, range(start, stop), total)
    for some, all_masks in zip(part, whole, strict=True):
        assert np.array_equal(some, all_masks[start:stop])


@given(any_mask, grids, st.integers(0, 1000))
def test_the_context_is_all_that_is_no_target(mask: MaskConfig, grid, step: int):
    context, target = draw(dataclasses.replace(mask, truncate="none"), 64, step, grid)
    assert target.shape == (64, mask.target_blocks, grid[0] * grid[1])
    assert ((target.sum(axis=1) + context[:, 0]) == 1).all(), "blocks are disjoint, and nothing is left out"


@given(st.sampled_from(OTHERS), grids, st.integers(0, 12), st.tuples(st.floats(0.3, 1), st.floats(1, 3)))
def test_whatever_passes_the_check_is_large_enough(strategy: str, grid, min_keep: int, aspect: tuple[float, float]):
    one = {"aspect_ratio": list(aspect)} if strategy == "block" else {}
    given_config = settings(grid, strategy=strategy, min_keep=min_keep, truncate="none", **one)
    try:
        check(given_config, 64)
    except ConfigError:
        assume(False)
    context, target = draw(given_config.mask, 256, grid=grid)
    assert min(lengths(context).min(), lengths(target).min()) > min_keep


@pytest.mark.parametrize("strategy", OTHERS)
def test_the_fewest_patches_are_those_of_many_draws(strategy: str):
    """`smallest` is reached, and never passed."""
    context, target = draw(of(strategy), 20_000, grid=(7, 9))
    assert fewest_patches(of(strategy), (7, 9)) == (lengths(context).min(), lengths(target).min())


def test_a_block_covers_three_fifths_in_many_shapes_and_places():
    context, target = draw(of("block"), 4096)
    found = boxes(target[:, 0], GRID)
    assert lengths(target).mean() == pytest.approx(0.6 * 256, rel=0.01)
    assert lengths(target) == pytest.approx(0.6 * 256, abs=8)  # half a column
    assert set(found[:, 2].tolist()) == set(range(11, 16))  # sqrt(153.6 * .75) to sqrt(153.6 * 1.5)
    assert set(found[:, 0].tolist()) >= {0, 1, 2, 3} and target.any(axis=(0, 1)).all()
    assert lengths(context).mean() == pytest.approx(0.4 * 256, rel=0.01)


@given(grids, st.tuples(st.floats(0.1, 1), st.floats(1, 10)), st.integers(0, 1000))
def test_a_block_keeps_its_area_on_any_grid(grid, aspect: tuple[float, float], step: int):
    """To half a column of its own, and in one piece."""
    _, target = draw(of("block", aspect_ratio=aspect), 64, step, grid)
    assert (np.abs(lengths(target) - 0.6 * grid[0] * grid[1]) <= boxes(target[:, 0], grid)[:, 2:3] / 2 + 1e-9).all()


def test_a_rasterized_mask_has_one_target_block_for_each_quadrant_but_one():
    context, target = draw(of("rasterized"), 4096)
    assert (lengths(target) == 64).all() and (lengths(context) == 64).all()
    for block in target.transpose(1, 0, 2):
        assert set(map(tuple, boxes(block, GRID).tolist())) == {(r, c, 8, 8) for r in (0, 8) for c in (0, 8)}
    kept = boxes(context[:, 0], GRID)
    assert [(kept[:, :2] == [r, c]).all(axis=1).mean() for r in (0, 8) for c in (0, 8)] == pytest.approx([0.25] * 4, abs=0.03)


def test_a_random_mask_hides_three_fifths_of_the_patches_each_alike():
    context, target = draw(of("random"), 4096)
    assert (lengths(target) == 154).all() and (lengths(context) == 102).all()
    assert target.mean(axis=(0, 1)) == pytest.approx(154 / 256, abs=0.04)
    together = np.corrcoef(target[:, 0].T.astype(float)) - np.eye(256)
    assert np.abs(together).max() < 0.1, "neighbours are drawn as apart as any two"


@pytest.mark.parametrize("share", [0.3, 0.75])
def test_blocks_and_random_masks_hide_the_share_that_is_asked_for(share: float):
    context, target = draw(of("random", hidden_share=share), 512)
    assert (lengths(target) == round(share * 256)).all() and (lengths(context) == 256 - round(share * 256)).all()
    context, target = draw(of("block", hidden_share=share), 512)
    assert lengths(target) == pytest.approx(share * 256, abs=8) and np.array_equal(context, ~target)


@pytest.mark.parametrize("strategy", ["multiblock", *OTHERS])
def test_seed_step_and_slot_each_change_the_masks_unless_the_batch_shares_them(strategy: str):
    apart, together = (draw(of(strategy, share=share), 64)[1].reshape(64, -1) for share in ("image", "batch"))
    least = {"rasterized": 4, "block": 30}  # a block has 150 places and shapes
    assert len(np.unique(apart, axis=0)) >= least.get(strategy, 64)
    assert (together == apart[0]).all(), "slot 0's"
    steps = np.array([draw(of(strategy, share="batch"), 2, step)[1][0] for step in range(32)]).reshape(32, -1)
    seeds = np.array([draw(of(strategy, share="batch"), 2, seed=seed)[1][0] for seed in range(32)]).reshape(32, -1)
    for found in (steps, seeds):
        assert len(np.unique(found, axis=0)) >= (4 if strategy == "rasterized" else 20)


@pytest.mark.parametrize("truncate", ["batch_min", "fraction", "none"])
def test_contexts_that_the_batch_shares_are_cut_alike(truncate: str):
    """Nothing is lost to a group's shortest context: all are as long."""
    shared = MaskConfig(share="batch", truncate=truncate)
    context, _ = draw(shared, 300)
    assert (context == context[0]).all()
    if truncate == "batch_min":
        assert np.array_equal(context, draw(dataclasses.replace(shared, truncate="none"), 300)[0])


def test_statistics_know_every_strategy():
    found = {name: statistics(settings(strategy=name, truncate="none"), groups=4) for name in OTHERS}
    assert found["rasterized"]["target_block"] == 64 and found["rasterized"]["target_union"] == 192
    for name in ("block", "random"):
        assert found[name]["target_block"] == found[name]["target_union"] == pytest.approx(154, abs=2)
        assert found[name]["context_after"] == pytest.approx(102, abs=2)


@pytest.mark.parametrize(
    "grid, mask, message",
    [
        ((4, 4), {"strategy": "rasterized"}, "mask.strategy: rasterized masks on the 4x4 grid hold as few as 4 patches"),
        ((1, 64), {"strategy": "rasterized", "min_keep": 0}, "as few as 0 patches"),
        ((4, 4), {"strategy": "random"}, "mask.strategy: random .* as few as 6 patches.*min_keep: 10"),
        ((5, 5), {"strategy": "block"}, "mask.strategy: block .* as few as 9 patches"),
        ((8, 8), {"strategy": "random", "hidden_share": 1.0}, "mask.strategy: random .* as few as 0 patches"),
    ],
)
def test_grids_too_small_for_a_strategy_are_refused(grid, mask: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        check(settings(grid, **mask), 128)


@pytest.mark.parametrize(
    "strategy, key, value",
    [
        ("block", "num_pred_masks", 2),
        ("rasterized", "num_enc_masks", 2),
        ("random", "pred_mask_scale", [0.3, 0.4]),
        ("random", "enc_mask_scale", [0.5, 1.0]),
        ("block", "allow_overlap", True),
        ("random", "aspect_ratio", [1.0, 1.0]),
        ("rasterized", "hidden_share", 0.5),
        ("multiblock", "hidden_share", 0.5),
    ],
)
def test_what_a_strategy_does_not_read_is_refused_unless_it_is_the_default(strategy: str, key: str, value: object):
    with pytest.raises(ConfigError, match=f"mask.{key}: means nothing to mask.strategy {strategy}"):
        settings(strategy=strategy, **{key: value})
    default = Config().to_dict()["mask"][key]
    assert settings(strategy=strategy, **{key: default}).mask.strategy == strategy
