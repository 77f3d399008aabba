"""Micro-batches padded to one shape: what is computed and learned is what it is without padding."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastjepa_kernels
from fastjepa.engine.cuda_graph import check_cuda_graph, padded_size
from fastjepa.errors import ConfigError
from fastjepa.loader.batch import Batch
from fastjepa.loss.jepa_loss import jepa_loss
from fastjepa.masks.draw import draw_masks
from fastjepa.masks.layouts import Masking
from fastjepa.masks.pack import pack
from fastjepa.masks.packed import PackedSize, PaddingBudget
from fastjepa.masks.packings import JOINT, PER_BLOCK
from fastjepa.masks.padding import drawn_sizes
from fastjepa.model.jepa import build_pair
from fastjepa.model.vit import use_attention
from fastjepa.plan.flops import flops_per_image
from fastjepa.plan.memory import row_counts
from fastjepa.plan.padding_cost import draws_over_budget, padding_note
from fastjepa.plan.plan import workload_of
from tests.support.networks import N, perturbed, small
from tests.support.padding import configured
from tests.support.places import ROOT

JEPA, TARGET = (perturbed(network) for network in build_pair(small()))
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@st.composite
def padded_pairs(draw):
    """Masks of 3 images, whether the predictor is joint, and a budget that holds them, slack included."""
    k, r, joint = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.booleans())
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    context, target = random.random((3, k, N)) < 0.4, random.random((3, r, N)) < 0.4
    context[:, :, 0] = target[:, :, 1] = True
    size = PackedSize.of(context, target.any(axis=1, keepdims=True) if joint else target)
    more, longer = (draw(st.integers(0, most)) for most in (20, 3))
    wanted = min(size.target + draw(st.integers(0, 9)), 3 * N)
    context_rows, queries = size.context + more, size.queries + draw(st.integers(0, 20))
    sequences = (1 if joint else r) * context_rows + queries
    bigger = PackedSize(context_rows, wanted, queries, sequences, *(length + longer for length in size[4:]))
    dummies = max(-(-(bigger[i] - size[i]) // bigger[j]) for i, j in ((0, 4), (2, 5), (3, 6)))
    return context, target, joint, PaddingBudget(bigger, dummies + draw(st.integers(0, 2)))


def learned(way: str, context_mask, target_mask, **how) -> tuple[torch.Tensor, list[torch.Tensor]]:
    for network in (JEPA, TARGET):
        use_attention(network, way)
    context, target, blocks = pack(context_mask, target_mask, **how)
    with torch.no_grad():
        features = TARGET(IMAGES, wanted=target)
    prediction, *_ = JEPA(IMAGES, context, blocks)
    JEPA.zero_grad()
    loss = jepa_loss(prediction, features, blocks)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in JEPA.parameters()]


def assert_same(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-7)
    for padded, plain in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(padded, plain, rtol=0, atol=1e-6 * max(1.0, float(plain.abs().max())))


@pytest.mark.parametrize("way", ["sdpa", "matmul"])
@settings(max_examples=25)
@given(pair=padded_pairs())
def test_padding_changes_neither_the_loss_nor_a_gradient(way, pair):
    context, target, joint, room = pair
    packing = JOINT if joint else PER_BLOCK
    assert_same(learned(way, context, target, packing=packing, budget=room), learned(way, context, target, packing=packing))


def pad_in_the_kernels() -> None:
    fastjepa_kernels.use("triton")
    small, large = masks_of(4, 3), masks_of(6, 4)
    assert PaddingBudget(PackedSize.of(*large), 5).holds(PackedSize.of(*small))
    assert_same(learned("short", *small, budget=PaddingBudget(PackedSize.of(*large), 5)), learned("short", *small))


@pytest.mark.slow
def test_padding_changes_nothing_in_the_kernels_either():
    """In Triton's interpreter, which must be chosen before triton is imported; two of the five dummies are empty or short."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", f"from {__name__} import pad_in_the_kernels; pad_in_the_kernels()"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@given(padded_pairs())
def test_every_batch_within_the_budget_has_its_shape(pair):
    context, target, joint, room = pair
    packed, plain = (pack(context, target, packing=JOINT if joint else PER_BLOCK, budget=b) for b in (room, None))
    batch = Batch(IMAGES, *packed, bad=())
    assert padded_size(batch) == room.size
    ragged = [(one[0], one[2].sequences, one[2].queries) for one in (packed, plain)]
    for padded, bare in zip(*ragged, strict=True):
        lengths = padded.cu_seqlens.diff()
        assert padded.cu_seqlens[-1] == len(padded.idx), "no row lies past the last sequence"
        assert lengths.max() <= padded.max_len and lengths.min() >= 0
        assert padded.mean_len == bare.mean_len == pytest.approx(len(bare.idx) / (len(bare.cu_seqlens) - 1))
        assert len(padded.cu_seqlens) == len(bare.cu_seqlens) + room.dummies
        assert torch.equal(padded.cu_seqlens[: len(bare.cu_seqlens)], bare.cu_seqlens), "dummies come last"
    assert len(packed[1].cu_seqlens) == 4 and len(set(packed[1].idx.tolist())) == room.size.target
    real = len(plain[2].weight)
    assert torch.equal(packed[2].weight[:real], plain[2].weight) and not packed[2].weight[real:].any()
    assert torch.equal(packed[1].idx[packed[2].target_rows[:real].long()], plain[1].idx[plain[2].target_rows.long()])


def masks_of(context: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    context_mask, target_mask = np.zeros((3, 1, N), bool), np.zeros((3, 2, N), bool)
    context_mask[:, :, :context] = target_mask[:, 0, -block:] = target_mask[:, 1, -block - 1 : -1] = True
    return context_mask, target_mask


def test_a_budget_that_is_met_exactly_pads_nothing():
    pair = masks_of(6, 4)
    for dummies in (0, 3):  # three dummies, all of them empty
        padded, plain = pack(*pair, budget=PaddingBudget(PackedSize.of(*pair), dummies)), pack(*pair)
        assert torch.equal(padded[2].sequences.idx, plain[2].sequences.idx)
        assert padded[0].cu_seqlens.tolist() == plain[0].cu_seqlens.tolist() + [18] * dummies
        assert_same(learned("matmul", *pair, budget=PaddingBudget(PackedSize.of(*pair), dummies)), learned("matmul", *pair))


@pytest.mark.parametrize("count", range(7))
def test_a_batch_over_any_count_is_left_as_it_is(count):
    pair = masks_of(6, 4)
    size = list(PackedSize.of(*pair))
    size[count] -= 1
    padded, plain = pack(*pair, budget=PaddingBudget(PackedSize(*size), 9)), pack(*pair)
    assert [t.tolist() for part in padded for t in part.tensors()] == [t.tolist() for part in plain for t in part.tensors()]
    assert padded_size(Batch(IMAGES, *padded, bad=())) != PackedSize(*size)


def test_a_batch_too_small_for_its_dummies_is_left_as_it_is():
    small_pair, size = masks_of(6, 4), PackedSize.of(*masks_of(10, 5))
    lacking = [(size[i] - PackedSize.of(*small_pair)[i], size[j]) for i, j in ((0, 4), (2, 5), (3, 6))]
    enough = max(-(-rows // longest) for rows, longest in lacking)
    assert PaddingBudget(size, enough).holds(PackedSize.of(*small_pair)) and not PaddingBudget(size, enough - 1).holds(
        PackedSize.of(*small_pair)
    )


def test_the_default_budget_holds_what_a_run_draws():
    config = configured()
    found = workload_of(config).padding_budget(8)
    sizes = [PackedSize(*size) for size in drawn_sizes(Masking.of(config), 8, 8).tolist()]
    assert sizes[5] == PackedSize.of(*draw_masks(Masking.of(config), 5, range(8), 8))
    assert all(found.holds(size) for size in sizes)
    later = (draw_masks(Masking.of(config), step, range(8), 8) for step in range(1000, 1300))
    held = [found.holds(PackedSize.of(*one)) for one in later]
    assert np.mean(held) > 0.98
    assert "0 of 1000 draws" in padding_note(workload_of(config), 8)
    assert row_counts(workload_of(config), 8).sequences == found.size.sequences, "the graph's memory"
    plain = small(data={"crop_size": 64, "batch_size": 8}, mask={"patch_size": 4, "min_keep": 4, "truncate_group": 8})
    assert flops_per_image(workload_of(config)) == flops_per_image(workload_of(plain)), "padding is no work"


def test_a_budget_that_is_given_replaces_rows_alone():
    config = configured(token_budget=[400, 900, 1200])
    assert workload_of(config).padding_budget(8).size[:4] == (400, 900, 1200, 4 * 400 + 1200)
    assert workload_of(config).padding_budget(8).size[4:] == workload_of(configured()).padding_budget(8).size[4:]
    over = sum(drawn_sizes(Masking.of(config), 8, 8)[:, :3].__gt__((400, 900, 1200)).any(axis=1))
    assert draws_over_budget(workload_of(config), 8) == over > 0


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(("device", "way", "ranks", "zero", "words"), [
    (CPU, "sdpa", 1, "auto", "needs a CUDA device"),
    (CUDA, "flash", 2, "auto", "one rank"),
    (CUDA, "flash", 1, 1, "runtime.zero 0"),
    (CUDA, "xformers", 1, 0, "runtime.attention"),
])  # fmt: skip
def test_what_cannot_be_captured_is_refused_in_a_sentence(device, way, ranks, zero, words):
    with pytest.raises(ConfigError, match=f"runtime.cuda_graph: .*{words}"):
        check_cuda_graph(device, way, ranks, zero)


def test_a_regularizer_that_would_pool_the_padding_is_refused():
    with pytest.raises(ConfigError, match="runtime.cuda_graph: not with loss.regularizer"):
        small(loss={"regularizer": "vicreg"}, runtime={"cuda_graph": True})
