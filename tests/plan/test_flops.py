"""The closed form against what torch counts, part by part, and against totals derived elsewhere for the official code."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import LossConfig
from fastjepa.masks.layouts import Masking
from fastjepa.masks.pack import pack
from fastjepa.masks.packer import Packer
from fastjepa.masks.packings import SEPARATE
from fastjepa.model import vit
from fastjepa.model.jepa import NetworkShape
from fastjepa.model.vit import Encoder, use_attention
from fastjepa.plan.flops import count_flops, encoder_flops, flops_of_packed, flops_per_image, official_flops
from fastjepa.plan.memory import RowCounts, row_counts
from fastjepa.plan.plan import workload_of
from tests.support.flops import assert_close, counted, draw, lengths, loop, tiny


@pytest.mark.parametrize("depth, pred_depth", [(3, 3), (1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("contexts", [1, 2])
def test_equal_lengths_match_torch(depth: int, pred_depth: int, contexts: int):
    """The trainer's own matmul attention; equal lengths, so that nothing is padded."""
    c = tiny(depth, pred_depth, num_enc_masks=contexts, truncate="batch_min")
    packed = pack(*draw(c))
    assert packed[0].length and packed[2].sequences.length
    assert_close(flops_of_packed(workload_of(c), *packed), counted(c, *packed))


@pytest.mark.parametrize("sampling", ["official", "uniform"])
def test_ragged_lengths_match_torch(monkeypatch: pytest.MonkeyPatch, sampling: str):
    c = tiny(images=4, truncate="none", sampling=sampling)
    packed = pack(*draw(c))
    assert packed[0].length is None
    monkeypatch.setattr(vit, "packed_attention", loop)
    assert_close(flops_of_packed(workload_of(c), *packed), counted(c, *packed))


@pytest.mark.parametrize("target", ["input", "pixels"])
@pytest.mark.parametrize("strategy", ["multiblock", "rasterized"])
def test_other_targets_match_torch(monkeypatch: pytest.MonkeyPatch, target: str, strategy: str):
    """Blocks that the target network sees alone, a sequence each; or no target network, and pixels to predict."""
    c = dataclasses.replace(tiny(images=4, truncate="none", strategy=strategy), loss=LossConfig(target=target))
    packed = pack(*draw(c), packing=Masking.of(c).packing)
    monkeypatch.setattr(vit, "packed_attention", loop)
    found = flops_of_packed(workload_of(c), *packed)
    assert_close(found, counted(c, *packed))
    assert (found.target_forward == 0) == (target == "pixels")
    assert flops_per_image(workload_of(c), steps=1) == pytest.approx(found.total)


@pytest.mark.parametrize("target", ["output", "input"])
@pytest.mark.parametrize(("numbers", "layers"), [((1, 3), "each"), ((1, 2), "each"), ((1, 2, 3), "mean")])
def test_targets_of_several_layers_match_torch(monkeypatch: pytest.MonkeyPatch, numbers, layers: str, target: str):
    """A head as wide as all of them, and no block that comes after the last."""
    loss = LossConfig(target=target, target_layers=numbers, layers=layers)
    c = dataclasses.replace(tiny(images=4, truncate="none"), loss=loss)
    packed = pack(*draw(c), packing=Masking.of(c).packing)
    monkeypatch.setattr(vit, "packed_attention", loop)
    assert_close(flops_of_packed(workload_of(c), *packed), counted(c, *packed))


@pytest.mark.parametrize("target", ["output", "input"])
@pytest.mark.parametrize("numbers", ["last", (2, 4)])
@pytest.mark.parametrize("patch_size", [4, 6])
def test_the_forward_of_a_teacher_matches_torch(monkeypatch: pytest.MonkeyPatch, patch_size: int, numbers, target: str):
    """A network of its own width, depth and MLPs, and of patches of its own, in place of the target network's forward."""
    c = dataclasses.replace(tiny(images=4, truncate="none"), loss=LossConfig(target=target, target_layers=numbers))
    shape = 40, 5, 4, 104, patch_size
    c = dataclasses.replace(c, meta=dataclasses.replace(c.meta, teacher="not read", teacher_shape=shape))
    teacher = Encoder(c.grid, patch_size, 1, c.mean_std, (40, 5, 4, 104 / 40))
    use_attention(teacher, "matmul")
    packed = pack(*draw(c), packing=Masking.of(c).packing)
    monkeypatch.setattr(vit, "packed_attention", loop)
    assert_close(flops_of_packed(workload_of(c), *packed), counted(c, *packed, teacher))
    assert encoder_flops(NetworkShape.of(c)) == encoder_flops(NetworkShape.of(tiny()))


USES = {
    "drawn": ({"predictor_context": 0.25, "predictor_repeats": 3}, {}),
    "visible": ({}, {"visible_weight": 0.5}),
    "both, jointly": ({"predictor_context": 0.5, "predictor_repeats": 2, "predictor": "joint"}, {"visible_weight": 0.5}),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("pred_depth", [1, 3])
def test_what_the_predictor_does_with_the_context_matches_torch(monkeypatch: pytest.MonkeyPatch, use: str, pred_depth: int):
    meta, loss = USES[use]
    c = tiny(3, pred_depth, images=4, truncate="none")
    c = dataclasses.replace(c, meta=dataclasses.replace(c.meta, **meta), loss=LossConfig(**loss))
    packed = Packer(Masking.of(c)).packed(0, range(4), 4)
    monkeypatch.setattr(vit, "packed_attention", loop)
    found = flops_of_packed(workload_of(c), *packed)
    assert_close(found, counted(c, *packed))
    assert flops_per_image(workload_of(c), steps=1) == pytest.approx(found.total)
    rows = RowCounts.of(*packed)
    assert row_counts(workload_of(c), 4, steps=1) == rows
    assert (rows.queries == rows.sequences) == bool(loss)


@pytest.mark.parametrize("contexts", [1, 2])
def test_a_projector_matches_torch(monkeypatch: pytest.MonkeyPatch, contexts: int):
    c = tiny(images=4, truncate="none", num_enc_masks=contexts)
    wide = dataclasses.replace(c, loss=LossConfig(regularizer="vicreg", projector=(512, 384, 64)))
    packed = pack(*draw(c))
    monkeypatch.setattr(vit, "packed_attention", loop)
    found, without = (flops_of_packed(workload_of(config), *packed) for config in (wide, c))
    assert_close(found, counted(wide, *packed), 1e-9)
    assert found.predictor_backward > 1.02 * without.predictor_backward


def test_a_block_by_itself_is_counted_as_it_is_packed():
    c = dataclasses.replace(tiny(num_pred_masks=2), loss=LossConfig(target="input"))
    context_mask, target_mask = np.zeros((2, 1, 48), bool), np.zeros((2, 2, 48), bool)
    context_mask[..., :20] = target_mask[..., 30:42] = True
    packed = pack(context_mask, target_mask, packing=SEPARATE)
    assert_close(count_flops(workload_of(c), 20, 12, 12), flops_of_packed(workload_of(c), *packed), 1e-12)


def test_attention_costs_the_sum_of_squares(monkeypatch: pytest.MonkeyPatch):
    """Contexts of 2 and 46 patches, to the last FLOP: the square of their mean would be far off."""
    c = tiny(images=2, truncate="none")
    context_mask, target_mask = np.zeros((2, 1, 48), bool), np.zeros((2, 4, 48), bool)
    context_mask[0, 0, :2] = context_mask[1, 0, :46] = True
    target_mask[0, :, :20] = target_mask[1, :, -2:] = True
    packed = pack(context_mask, target_mask)
    monkeypatch.setattr(vit, "packed_attention", loop)
    assert_close(flops_of_packed(workload_of(c), *packed), counted(c, *packed), 1e-9)


def test_wide_heads_and_mlp_ratios_match_torch():
    """The mlp ratio of vit_giant is 48/11, while the predictor's stays 4."""
    c = tiny(truncate="batch_min")
    c = dataclasses.replace(c, meta=dataclasses.replace(c.meta, model_name="vit_giant", embed_dim=88))
    packed = pack(*draw(c))
    assert_close(flops_of_packed(workload_of(c), *packed), counted(c, *packed))


@given(context=st.integers(1, 48), block=st.integers(1, 20), extra=st.integers(0, 20), contexts=st.integers(1, 2),
       images=st.integers(1, 3), depth=st.integers(1, 3), pred_depth=st.integers(1, 3))  # fmt: skip
def test_count_is_packed_for_equal_lengths(context, block, extra, contexts, images, depth, pred_depth):
    c = tiny(depth, pred_depth, images, num_enc_masks=contexts, num_pred_masks=2)
    union = block + min(extra, block)
    exact = flops_of_packed(workload_of(c), *lengths(context, block, union, contexts, 2, images))
    assert_close(count_flops(workload_of(c), context, block, union), exact, 1e-12)
    assert_close(count_flops(workload_of(c), context, block, union, images=images), exact, 1e-12)


def test_the_savings_are_those_the_model_makes():
    """Against the official code's work: the same context forward but for patches nobody sees, and less of all the rest."""
    c = tiny(truncate="batch_min")
    ours, theirs = count_flops(workload_of(c), 12, 6, 18), official_flops(workload_of(c), 12, 6)
    patches = 2 * 48 * 16 * 48  # 2 x N x patch pixels x D
    assert theirs.context_forward - ours.context_forward == pytest.approx(patches * (1 - 12 / 48))
    unwanted = 2 * 48 * 30 * (2 * 48 + 2 * 48 + 2 * 4 * 48)  # 30 of 48 rows lack q, attention, proj and mlp in the last block
    assert theirs.target_forward - ours.target_forward == pytest.approx(unwanted)
    assert ours.predictor_forward < theirs.predictor_forward
    assert ours.predictor_backward == pytest.approx(2 * ours.predictor_forward)


# Mean patches of a context (after the cut) and of a block: masks.statistics, 2 seeds x 1,000 groups of 128, by patch size.
LENGTHS = {16: (50.4, 33.3), 14: (68.7, 44.2)}
DERIVED = {  # GFLOP an image and the shares of target, context and predictor, rounded, from another derivation
    ("vit_small", 16, 6): (38, 0.24, 0.18, 0.58),
    ("vit_base", 16, 6): (84, 0.42, 0.32, 0.27),
    ("vit_large", 16, 12): (261, 0.47, 0.36, 0.17),
    ("vit_huge", 14, 12): (654, 0.51, 0.40, 0.09),
}


@pytest.mark.parametrize("name, patch, pred_depth", DERIVED)
def test_official_totals(name: str, patch: int, pred_depth: int):
    """Within rounding and the sampling error of the lengths."""
    c = config_from_dict({"mask": {"patch_size": patch}, "meta": {"model_name": name, "pred_depth": pred_depth}})
    f = official_flops(workload_of(c), *LENGTHS[patch])
    gflop, target, context, predictor = DERIVED[name, patch, pred_depth]
    assert f.total / 1e9 == pytest.approx(gflop, abs=0.5, rel=0.005)
    shares = f.target_forward, f.context_forward + f.context_backward, f.predictor_forward + f.predictor_backward
    assert [part / f.total for part in shares] == pytest.approx([target, context, predictor], abs=0.006)


def test_of_config_is_the_mean_over_steps():
    c = tiny(images=4, truncate="none")
    steps = [flops_of_packed(workload_of(c), *pack(*draw(c, step))).total for step in range(3)]
    assert flops_per_image(workload_of(c), steps=3) == pytest.approx(np.mean(steps))
    assert len(set(steps)) > 1


def test_of_config_cuts_as_the_whole_batch_does():
    """More images share a cut, so contexts get shorter."""
    c = tiny(images=2, truncate="batch_min", truncate_group=2, sampling="uniform")
    many = dataclasses.replace(c, mask=dataclasses.replace(c.mask, truncate_group=64))
    assert flops_per_image(workload_of(many), total=64) < flops_per_image(workload_of(c), total=64)


@pytest.mark.parametrize("target", ["output", "input", "pixels"])
def test_the_encoder_on_a_whole_image_is_the_same_whatever_the_targets(target: str):
    c = tiny()
    everything = count_flops(workload_of(c), 1, 1, 48).target_forward
    assert encoder_flops(NetworkShape.of(dataclasses.replace(c, loss=LossConfig(target=target)))) == pytest.approx(everything)
