"""FP8 in the target network: the real product against its definition, and what it does to features."""

import json
import sys

import pytest
import torch

from fastjepa.engine.average import Average
from fastjepa.errors import ConfigError
from fastjepa.masks.pack import pack
from fastjepa.model.fp8 import FP8_CAPABILITY, Linear8, fp8_linear, fp8_linear_ref, quantise, use_fp8
from fastjepa.model.jepa import build_pair
from fastjepa.run.build import build_networks
from tests.support.networks import masks, small
from tests.support.places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import fp8 as bench  # noqa: E402  (only importable from here on)

WIDE = {"meta": {"model_name": "vit_base", "depth": 2, "embed_dim": None, "num_heads": None, "pred_depth": 1}}


def test_a_product_is_its_definition_within_bf16():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(37, 64) * torch.logspace(-3, 3, 37)[:, None], torch.randn(48, 64), torch.randn(48)
    found, expected = fp8_linear(x, weight, bias), fp8_linear_ref(x, weight, bias)
    assert found.dtype == torch.bfloat16
    largest = expected.abs().amax(dim=1, keepdim=True)
    assert ((found.float() - expected).abs() / largest).max() < 2**-7
    exact = torch.nn.functional.linear(x, weight, bias)
    assert 0.01 < (expected - exact).norm() / exact.norm() < 0.06, "the rounding of e4m3, at most 2^-4 of either factor"


def test_rows_have_scales_of_their_own():
    """A row a million times smaller than its neighbour keeps its digits; zeros stay zeros."""
    x = torch.tensor([[1e6] * 16, [1.0] * 16, [0.0] * 16])
    rounded, scale = quantise(x)
    assert scale.shape == (3, 1)
    torch.testing.assert_close(rounded.float() * scale, x)
    assert not quantise(torch.full((1, 16), 3e38))[0].float().isnan().any()


def test_the_network_keeps_its_parameters_and_state_dict():
    target = build_pair(small())[1]
    before, names = list(target.parameters()), list(target.state_dict())
    use_fp8(target)
    assert all(a is b for a, b in zip(before, target.parameters(), strict=True)) and names == list(target.state_dict())
    assert sum(isinstance(module, Linear8) for module in target.modules()) == 4 * len(target.blocks)


def test_features_move_by_the_rounding_and_follow_the_average():
    """A network of ViT-B's width, with weights as in training: some percent, and again after the average has moved."""
    jepa, plain = build_pair(small(**WIDE))
    for network in (jepa, plain):
        perturbed_little(network)
    narrow = build_pair(small(**WIDE))[1]
    narrow.load_state_dict(plain.state_dict())
    use_fp8(narrow)
    images, target = torch.randn(3, 3, 32, 32), pack(*masks())[1]
    errors = []
    for _ in range(2):
        with torch.no_grad():
            found, expected = narrow(images, wanted=target), plain(images, wanted=target)
        errors.append(float((found - expected).norm() / expected.norm()))
        for network in (narrow, plain):
            Average(network, jepa.encoder).update(0.5, torch.tensor(True))
    assert all(1e-3 < error < 0.1 for error in errors), errors


def perturbed_little(network: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))


def test_it_is_refused_below_vit_b_and_off_such_a_gpu():
    with pytest.raises(ConfigError, match=r"runtime.target_fp8: an encoder 384 wide is below ViT-B's 768"):
        small(meta={"embed_dim": 384}, runtime={"target_fp8": True})
    config = small(**WIDE, runtime={"target_fp8": True, "dtype": "bf16"})
    with pytest.raises(ConfigError, match="runtime.target_fp8: it needs a GPU of sm_89"):
        build_networks(config, torch.device("cpu"))


def test_the_benchmark_states_the_error_of_the_features(capsys):
    toy = ["--size=32", "--images=2", "mask.patch_size=8", "meta.embed_dim=64", "meta.depth=2", "meta.num_heads=4"]
    assert bench.main([*toy, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["weights"], found["images"], list(found["errors"])) == ("initial", 2, ["fp8"])
    assert 0.001 < found["errors"]["fp8"]["relative"] < 0.1 < found["errors"]["fp8"]["worst_cosine"]
    assert bench.main([*toy, "meta.depth=none"]) == 2
    assert "meta.depth" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_product_is_the_same_on_a_gpu():
    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("needs sm_89")
    x, weight, bias = torch.randn(1000, 768), torch.randn(3072, 768), torch.randn(3072)
    found = fp8_linear(x.cuda(), weight.cuda(), bias.cuda()).cpu().float()
    expected = fp8_linear_ref(x, weight, bias)
    assert ((found - expected).abs() / expected.abs().amax(dim=1, keepdim=True)).max() < 2**-6
