"""The packed networks against timm's ViT and against the plain way of writing them, gradients included."""

import functools

import numpy as np
import pytest
import timm
import torch

from fastjepa.config.schema import MODELS
from fastjepa.errors import ConfigError
from fastjepa.masks.pack import pack
from fastjepa.masks.packed import Packed
from fastjepa.model.jepa import build_pair
from fastjepa.model.vit import Block, Encoder, choose_attention, packed_attention, sincos_positions, use_attention
from tests.support.networks import N, masks, perturbed, plain_jepa, small

FORMS = {
    "official": {},
    "rope": {"positions": "rope"},
    "qk_norm": {"qk_norm": True},
    "both": {"positions": "rope", "qk_norm": True},
}


@pytest.mark.parametrize(("depth", "pred_depth"), [(2, 2), (1, 1), (3, 3)])
@pytest.mark.parametrize(("way", "form"), [("sdpa", "official"), *(("matmul", form) for form in FORMS)])
def test_jepa_equals_a_per_image_loop_with_two_ragged_contexts(depth, pred_depth, way, form):
    heads = {"num_heads": 4, "pred_num_heads": 3}  # of 8 channels each
    jepa, _ = build_pair(small(meta={"depth": depth, "pred_depth": pred_depth} | heads | FORMS[form]))
    use_attention(perturbed(jepa), way)
    context_mask, target_mask = masks()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    context, _, blocks = pack(context_mask, target_mask)

    ours = jepa(images, context, blocks)[:2]
    sum(out.square().sum() for out in ours).backward()
    gradients = {name: parameter.grad for name, parameter in jepa.named_parameters()}
    jepa.zero_grad()
    plain = plain_jepa(jepa, images, context_mask, target_mask)
    sum(out.square().sum() for out in plain).backward()

    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for name, parameter in jepa.named_parameters():  # that of a bias of k_norm is zero, as softmax forgets what all keys share
        least = 1e-5 + 1e-3 * float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=least)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_encoder_equals_timm(qk_norm):
    encoder = perturbed(build_pair(small(meta={"qk_norm": qk_norm}))[0].encoder)
    vit = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, class_token=False, global_pool="avg", num_classes=0,
        fc_norm=False, norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6), qk_norm=qk_norm,
    )  # fmt: skip
    vit.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder.features(images), vit.forward_features(images), rtol=1e-5, atol=1e-5)


def test_wanted_rows_are_those_of_the_whole():
    encoder = perturbed(build_pair(small())[1])
    images = torch.randn(3, 3, 32, 32)
    _, target, _ = pack(*masks())
    torch.testing.assert_close(encoder(images, wanted=target), encoder(images)[target.idx.long()], rtol=1e-5, atol=1e-5)


def test_patches_outside_the_context_are_never_seen():
    encoder = build_pair(small())[0].encoder
    images = torch.randn(1, 3, 32, 32)
    mask = np.zeros((1, 1, N), dtype=bool)
    mask[0, 0, :4] = True  # the first row of patches
    context, _, _ = pack(mask, mask)
    seen = encoder(images, context)
    images[:, :, 8:] = float("nan")
    assert torch.equal(encoder(images, context), seen)


@pytest.mark.parametrize("size", [(32, 48), (16, 16), (64, 32)])
def test_other_resolutions_get_their_own_positions(size):
    encoder = build_pair(small())[0].encoder
    images = torch.randn(2, 3, *size)
    native = build_pair(small(data={"crop_size": list(size)}))[0].encoder
    native.load_state_dict(encoder.state_dict() | {"pos_embed": native.pos_embed})
    assert torch.equal(encoder.features(images), native.features(images))


def test_positions_encode_the_column_first_then_the_row():
    positions = sincos_positions(8, (2, 3))[0]
    column, row = 2.0, 1.0
    rate = torch.tensor([1.0, 0.01])
    expected = torch.cat([f(axis * rate) for axis in (column, row) for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(positions[1 * 3 + 2], expected)


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    first = build_pair(small())[0].state_dict()
    torch.manual_seed(6)
    before = torch.random.get_rng_state()
    second = build_pair(small())[0].state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_pair(small(runtime={"seed": 1}))[0].state_dict()
    assert not torch.equal(first["encoder.blocks.0.mlp.fc1.weight"], other["encoder.blocks.0.mlp.fc1.weight"])
    assert first["encoder.blocks.0.mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(("name", "millions"), [("vit_small", 21.6), ("vit_base", 85.6), ("vit_giant", 1011.2)])
def test_sizes_of_the_named_models(name, millions):
    with torch.device("meta"):
        dim, depth, heads, mlp_ratio = MODELS[name]
        encoder = Encoder.__new__(Encoder)
        torch.nn.Module.__init__(encoder)
        blocks = torch.nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
    count = sum(p.numel() for p in blocks.parameters()) + 16 * 16 * 3 * dim + 3 * dim
    assert count / 1e6 == pytest.approx(millions, abs=0.6)


def test_checkpointed_activations_change_nothing():
    context, _, blocks = pack(*masks())
    images = torch.randn(3, 3, 32, 32)
    gradients = []
    for flag in (False, True):
        jepa, _ = build_pair(small(runtime={"checkpoint_activations": flag}))
        jepa(images, context, blocks)[0].square().sum().backward()
        gradients.append([p.grad for p in jepa.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.long
def test_compiled_networks_give_the_same_gradients():
    context, _, blocks = pack(*masks())
    images = torch.randn(3, 3, 32, 32)
    gradients = []
    for compiled in (False, True):
        jepa, _ = build_pair(small(meta={"depth": 1, "pred_depth": 1}))  # compiling takes longer with every block
        if compiled:
            jepa.compile(dynamic=True)
        jepa(images, context, blocks)[0].square().sum().backward()
        gradients.append([p.grad for p in jepa.parameters()])
    for plain, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-5)


def ragged(lengths) -> Packed:
    return Packed.of(np.arange(sum(lengths)), np.array(lengths))


@pytest.mark.parametrize("way", ["sdpa", "matmul"])
@pytest.mark.parametrize("lengths", [([3, 5], [4, 2]), ([70, 1, 90], [66, 80, 65]), ([4, 4], [6, 6]), ([1], [1])])
def test_attention_stays_within_its_sequence(way, lengths):
    queries, keys = ragged(lengths[0]), ragged(lengths[1])
    q, k, v = (torch.randn(sum(n), 2, 8, dtype=torch.float64, requires_grad=True) for n in (lengths[0], lengths[1], lengths[1]))
    out = packed_attention(q, k, v, queries, keys, way)
    parts = []
    for qi, ki, vi in zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True):
        weights = (torch.einsum("qhd,khd->hqk", qi, ki) * 8**-0.5).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, vi))
    torch.testing.assert_close(out, torch.cat(parts))
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, torch.cat(parts))]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["flash", "varlen", "xformers"])
def test_attention_that_cannot_run_is_refused(name):
    with pytest.raises(ConfigError, match=f"runtime.attention: {name}"):
        choose_attention(name, torch.device("cpu"), torch.bfloat16)


def test_attention_chosen_on_a_cpu():
    cpu = torch.device("cpu")
    assert choose_attention("auto", cpu, torch.float32) == "sdpa"
    assert choose_attention("auto", cpu, torch.bfloat16) == "matmul"


def test_bytes_are_normalised_where_patches_are_cut():
    """uint8 images give what their normalised floats give, whole or in part."""
    setting = small(data={"crop_size": 32, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]})
    encoder = perturbed(build_pair(setting)[0].encoder)
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in setting.mean_std)
    context = pack(*masks())[0]
    for visible in (None, context):
        torch.testing.assert_close(encoder(pixels, visible), encoder((pixels / 255 - mean) / std, visible))
