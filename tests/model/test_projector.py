"""The projector before a regularizer: a plain MLP on the means of contexts, with gradients, inside of the trained pair."""

import sys

import pytest
import torch
from torch.nn import functional as F

from fastjepa.errors import ConfigError, UserError
from fastjepa.loss.regularizers import regularizer_term
from fastjepa.masks.pack import pack
from fastjepa.masks.packed import Packed
from fastjepa.model.jepa import build_pair
from fastjepa.model.projector import build_projector
from tests.support.networks import masks, perturbed, plain_jepa, small

PROJECTED = {"regularizer": "vicreg", "projector": [48, 40, 8]}


def plain_projection(weights: dict[str, torch.Tensor], features: torch.Tensor, contexts: Packed) -> torch.Tensor:
    """Each context's mean through three linear layers, the first two without a bias, each with a layer norm and a ReLU."""
    ends = contexts.cu_seqlens.tolist()
    x = torch.stack([features[start:end].mean(dim=0) for start, end in zip(ends, ends[1:], strict=False)])
    for layer in (0, 3):
        x = x @ weights[f"layers.{layer}.weight"].T
        x = F.layer_norm(x, x.shape[1:], weights[f"layers.{layer + 1}.weight"], weights[f"layers.{layer + 1}.bias"]).relu()
    return x @ weights["layers.6.weight"].T + weights["layers.6.bias"]


def test_the_regularizer_reads_a_plain_mlp_of_the_means_of_contexts_with_gradients():
    jepa = perturbed(build_pair(small(loss=PROJECTED))[0])
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    context_mask, target_mask = masks()
    context, _, blocks = pack(context_mask, target_mask)
    term = regularizer_term("vicreg", 1.0, 0.04)

    pooled = jepa(images, context, blocks)[2]
    trained = dict(jepa.encoder.named_parameters()) | dict(jepa.predictor.projector.named_parameters())
    found = torch.autograd.grad(term(pooled, 0), list(trained.values()))
    features = plain_jepa(jepa, images, context_mask, target_mask)[1]
    expected = plain_projection(dict(jepa.predictor.projector.named_parameters()), features, context)
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(term(expected, 0), list(trained.values()))
    for name, ours, theirs in zip(trained, found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 + 1e-3 * float(theirs.abs().max()), msg=name)


def test_two_equal_hidden_widths_are_the_local_head_of_vicregl():
    from lightly.models.modules.heads import VicRegLLocalProjectionHead

    torch.manual_seed(0)
    theirs = VicRegLLocalProjectionHead(input_dim=32, hidden_dim=48, output_dim=8)
    torch.manual_seed(0)
    ours = build_projector(32, (48, 48, 8))
    x = torch.randn(4, 32)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours(x), theirs(x))


def test_encoder_and_predictor_start_as_they_do_without():
    with_it, without = (build_pair(small(loss=loss))[0].state_dict() for loss in (PROJECTED, {}))
    assert len(with_it.keys() - without.keys()) == 8
    assert all(torch.equal(with_it[name], tensor) for name, tensor in without.items())


def test_nothing_is_pooled_where_no_regularizer_reads_it():
    jepa, _ = build_pair(small())
    context, _, blocks = pack(*masks())
    assert jepa(torch.randn(3, 3, 32, 32), context, blocks)[2] is None


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        ({"projector": [48, 8]}, "loss.projector: projects features for loss.regularizer, which is none"),
        (PROJECTED | {"projector": [48, 0]}, "loss.projector: .* must be widths greater than 0"),
        (PROJECTED | {"projector": []}, "loss.projector: .* must be widths greater than 0"),
    ],
)
def test_a_projector_that_cannot_be_is_refused(loss, says):
    with pytest.raises(ConfigError, match=says):
        small(loss=loss)


def test_without_lightly_it_is_refused(monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "lightly"] + ["lightly"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"loss.projector: needs lightly; pip install 'fastjepa\[lightly\]'"):
        build_pair(small(loss=PROJECTED))
