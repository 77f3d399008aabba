"""Rotary positions: angles by hand, a common shift that changes nothing, other sizes. The loop they equal is in test_jepa."""

import math

import pytest
import torch

from fastjepa.masks.pack import pack
from fastjepa.model import predictor, vit
from fastjepa.model.jepa import build_pair
from fastjepa.model.rotary import grid_rotation, rotate
from tests.support.networks import masks, perturbed, small

CPU = torch.device("cpu")
ROPE = {"positions": "rope", "pred_num_heads": 3}


def angles(head_dim: int, grid: tuple[int, int]) -> torch.Tensor:
    """(N, d / 2) in units of pi, as far as -1 to 1 tells them."""
    turn = grid_rotation(head_dim, grid, CPU)
    return torch.atan2(turn.sin, turn.cos)[:, 0] / math.pi


def test_angles_are_those_of_the_worked_example():
    """An angle of 1.5 pi reads as -0.5 pi, and one of -pi as either end of the circle."""
    row, column = angles(8, (2, 4))[3].split(2)
    assert abs(row[0]) == pytest.approx(1.0) and row[1] == pytest.approx(-0.1, abs=1e-5)
    assert column.tolist() == pytest.approx([-0.5, 0.15], abs=1e-5)


def test_a_quarter_turn():
    x = torch.tensor([1.0, 0.0]).view(1, 1, 2)
    turn = type(grid_rotation(4, (1, 1), CPU))(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    assert rotate(x, turn).flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("grid", [(4, 4), (2, 6), (7, 3)])
@pytest.mark.parametrize("shift", [(0.5, -0.25), (3.0, 0.0)])
def test_products_know_where_patches_lie_to_each_other_alone(grid, shift):
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(grid[0] * grid[1], 2, 8, generator=random) for _ in range(2))
    here, there = (grid_rotation(8, grid, CPU, by) for by in ((0.0, 0.0), shift))
    products = [torch.einsum("qhd,khd->hqk", rotate(q, turn), rotate(k, turn)) for turn in (here, there)]
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(products[0], torch.einsum("qhd,khd->hqk", q, k), atol=0.1)


def test_a_shift_of_all_positions_changes_no_feature_and_no_prediction(monkeypatch):
    jepa, _ = build_pair(small(meta=ROPE))
    perturbed(jepa)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    context, _, blocks = pack(*masks())
    before = jepa(images, context, blocks)[:2]
    for module in (vit, predictor):
        monkeypatch.setattr(module, "grid_rotation", lambda *args: grid_rotation(*args, shift=(0.7, -1.3)))
    for old, new in zip(before, jepa(images, context, blocks)[:2], strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)


def test_without_their_order_patches_are_told_apart():
    """Features of two patches of one image that change places change places, but not with positions."""
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mirrored = images.view(1, 3, 4, 8, 32).flip(2).view(1, 3, 32, 32)  # rows of patches
    encoder = perturbed(build_pair(small(meta=ROPE))[0].encoder)
    whole, other = (encoder.features(x).view(4, 4, -1) for x in (images, mirrored))
    assert not torch.allclose(other.flip(0), whole, atol=1e-2)


@pytest.mark.parametrize("size", [(32, 48), (16, 16), (64, 32)])
def test_other_sizes_are_native_ones(size):
    """Nothing in the weights says the size: an encoder of another grid has the same."""
    encoder = perturbed(build_pair(small(meta=ROPE))[0].encoder)
    native = build_pair(small(data={"crop_size": list(size)}, meta=ROPE))[0].encoder
    native.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, *size)
    assert torch.equal(encoder.features(images), native.features(images))


def test_no_code_is_in_the_weights_and_the_mask_token_is_one_row():
    jepa, target = build_pair(small(meta=ROPE))
    assert not [name for network in (jepa, target) for name in network.state_dict() if "pos_embed" in name]
    context, _, _ = pack(*masks())
    table, rotation = jepa.predictor.table(torch.zeros(len(context.idx), 32), context)
    assert len(table) == len(context.idx) + 16 == len(rotation.cos)
    assert torch.equal(table[-16:], jepa.predictor.mask_token[0].expand(16, -1))


def test_it_is_the_dtype_of_autocast_that_reaches_attention(monkeypatch):
    seen, plain = [], vit.packed_attention
    monkeypatch.setattr(
        vit, "packed_attention", lambda q, k, v, *rest: seen.append((q.dtype, k.dtype, v.dtype)) or plain(q, k, v, *rest)
    )
    encoder = build_pair(small(meta=ROPE | {"qk_norm": True}))[0].encoder
    with torch.autocast("cpu", torch.bfloat16):
        encoder.features(torch.randn(1, 3, 32, 32))
    assert seen == [(torch.bfloat16,) * 3] * 2
