"""Other objectives: a predictor that sees all blocks at once, and several contexts for one pass of the target network."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.config.schema import Config
from fastjepa.engine.average import Average
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.schedule import StepSettings
from fastjepa.loader.batch import Batch
from fastjepa.loss.jepa_loss import jepa_loss
from fastjepa.masks.layouts import Masking
from fastjepa.masks.pack import pack
from fastjepa.masks.packings import JOINT, PER_BLOCK
from fastjepa.model import vit
from fastjepa.model.jepa import build_pair
from fastjepa.plan.flops import count_flops, flops_of_packed, flops_per_image
from fastjepa.plan.memory import row_counts
from fastjepa.plan.plan import workload_of
from tests.support.flops import assert_close, counted, draw, lengths, loop, tiny
from tests.support.networks import N, masks, perturbed, plain_jepa, small
from tests.support.steps import take_step

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def joint(c: Config) -> Config:
    return replace(c, meta=replace(c.meta, predictor="joint"))


def learned(context_mask, target_mask, together: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    jepa, target_encoder = (perturbed(network) for network in build_pair(small()))
    context, target, blocks = pack(context_mask, target_mask, packing=JOINT if together else PER_BLOCK)
    with torch.no_grad():
        features = target_encoder(IMAGES, wanted=target)
    loss = jepa_loss(jepa(IMAGES, context, blocks)[0], features, blocks)
    loss.backward()
    return loss.detach(), [p.grad for p in jepa.parameters()]


@pytest.mark.parametrize("contexts", [1, 2])
def test_with_one_block_joint_is_the_papers_predictor_bit_for_bit(contexts):
    pair = masks(k=contexts, r=1)
    (loss, gradients), (expected, theirs) = (learned(*pair, together) for together in (True, False))
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, theirs, strict=True))


def test_with_several_it_is_a_loop_over_images_whose_block_is_the_union():
    """Every query attends to the context and to the patches of all blocks, each of which is there once."""
    jepa = perturbed(build_pair(small())[0])
    context_mask, target_mask = masks()
    context, _, blocks = pack(context_mask, target_mask, packing=JOINT)
    expected, _ = plain_jepa(jepa, IMAGES, context_mask, target_mask.any(axis=1, keepdims=True))
    torch.testing.assert_close(jepa(IMAGES, context, blocks)[0], expected, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 8), st.integers(0, 2**32))
def test_a_patch_weighs_what_it_does_in_all_blocks_together(k, r, of_step, seed):
    random = np.random.default_rng(seed)
    context_mask, target_mask = random.random((3, k, N)) < 0.4, random.random((3, r, N)) < 0.4
    target_mask[:, :, 1] = True
    apart, joined = (pack(context_mask, target_mask, of_step, packing) for packing in (PER_BLOCK, JOINT))
    assert torch.equal(joined[1].idx, apart[1].idx), "the target network does the same work"
    weights = [torch.zeros(len(one[1].idx)).index_add(0, one[2].target_rows, one[2].weight) for one in (apart, joined)]
    torch.testing.assert_close(weights[1], weights[0])
    assert len(joined[2].sequences.cu_seqlens) == 3 * k + 1 and len(joined[2].queries.idx) == k * len(apart[1].idx)


def test_flops_and_rows_are_those_of_the_joint_predictor(monkeypatch: pytest.MonkeyPatch):
    c = joint(tiny(images=3, truncate="none", num_enc_masks=2))
    packed = pack(*draw(c), packing=JOINT)
    monkeypatch.setattr(vit, "packed_attention", loop)
    assert_close(flops_of_packed(workload_of(c), *packed), counted(c, *packed))
    steps = [flops_of_packed(workload_of(c), *pack(*draw(c, step), packing=JOINT)).total for step in range(16)]
    assert flops_per_image(workload_of(c)) == pytest.approx(np.mean(steps))
    assert row_counts(workload_of(c), 3, steps=1).sequences == len(packed[2].sequences.idx)


@pytest.mark.parametrize("contexts", [1, 2])
def test_the_closed_form_is_exact_for_equal_lengths(contexts):
    c = joint(tiny(images=2, num_enc_masks=contexts, num_pred_masks=2))
    context_mask, target_mask = (np.zeros((2, count, 48), bool) for count in (contexts, 2))
    context_mask[:, :, 36:] = target_mask[:, 0, :8] = target_mask[:, 1, 4:12] = True
    packed = pack(context_mask, target_mask, packing=JOINT)
    assert_close(count_flops(workload_of(c), 12, 8, 12), flops_of_packed(workload_of(c), *packed), 1e-12)
    assert (
        count_flops(workload_of(c), 12, 8, 12).total
        < flops_of_packed(workload_of(c), *lengths(12, 8, 12, contexts, 2, 2)).total
    )


@pytest.mark.parametrize("contexts", [1, 4])
def test_all_contexts_share_one_pass_of_the_target_network(contexts):
    jepa, target_encoder = build_pair(small())
    passes, rows = [], []
    target_encoder.register_forward_hook(lambda *_: passes.append(1))
    jepa.encoder.register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[1].cu_seqlens) - 1))
    batch = Batch(IMAGES, *pack(*masks(k=contexts)), bad=())
    now = StepSettings(lr=1e-3, weight_decay=0.1, ema_momentum=0.9)
    take_step(PlainEngine(jepa), Average(target_encoder, jepa.encoder), [batch], now, small())
    assert (passes, rows) == ([1], [3 * contexts])


def test_a_view_gets_cheaper_by_the_target_pass_it_shares():
    one, four = (count_flops(workload_of(tiny(images=2, num_enc_masks=k)), 12, 6, 18) for k in (1, 4))
    assert four.target_forward == one.target_forward
    assert four.context_forward == pytest.approx(4 * one.context_forward)
    assert one.total - four.total / 4 >= 0.75 * one.target_forward


@pytest.mark.parametrize("setting", [{"meta": {"predictor": "joint"}}, {"mask": {"num_enc_masks": 2}}])
def test_the_loss_falls(setting):
    """On one batch the pair learns what its target says, with a target that moves slowly."""
    config = small(**setting)
    jepa, target_encoder = build_pair(config)
    engine, average = PlainEngine(jepa), Average(target_encoder, jepa.encoder)
    batch = Batch(
        IMAGES,
        *pack(*masks(k=config.mask.num_enc_masks), packing=Masking.of(config).packing),
        bad=(),
    )
    now = StepSettings(lr=2e-3, weight_decay=0.0, ema_momentum=0.999)
    found = [float(take_step(engine, average, [batch], now, config).loss) for _ in range(60)]
    assert found[-1] < 0.5 * found[0]
