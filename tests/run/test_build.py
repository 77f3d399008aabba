"""Attention at the door: what each network's heads and an image's patches allow, and what the user is told."""

import sys

import pytest
import torch

from fastjepa.errors import ConfigError
from fastjepa.model.jepa import build_pair
from fastjepa.model.vit import Attention, use_auto_attention
from fastjepa.run.build import apply_process_settings, attention_ways, check_compute, run_warnings
from tests.support.networks import small

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16 = {"dtype": "bf16"}


@pytest.fixture(autouse=True)
def varlen_alone(monkeypatch):
    """Let torch's varlen be the one library that is here."""
    found = sys.modules["fastjepa_kernels.varlen_attention"]
    monkeypatch.setattr(found, "missing", lambda way: "" if way == "varlen" else "no such module")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.parametrize(
    ("meta", "ways", "told"),
    [
        ({"pred_emb_dim": 32}, ("varlen", "varlen"), []),
        ({"pred_emb_dim": 48}, ("varlen", "sdpa"), ["predictor"]),  # heads of 8 and of 12 channels
        ({"embed_dim": 48, "pred_emb_dim": 48, "pred_num_heads": 6}, ("sdpa", "varlen"), ["encoder"]),
    ],
)
def test_auto_takes_what_can_run_for_the_heads_of_each_network(meta, ways, told):
    config = small(meta={"num_heads": 4} | meta, runtime=BF16)
    assert attention_ways(config, CUDA) == ways == check_compute(config, CUDA)
    notes = [note for note in run_warnings(config, CUDA) if "attention" in note]
    assert [note.partition("'s attention runs in sdpa")[0].removeprefix("the ") for note in notes] == told


def test_a_run_on_a_cpu_or_in_fp32_is_told_nothing_of_attention():
    assert not [note for note in run_warnings(small(runtime=BF16), CPU) if "attention" in note]
    assert not run_warnings(small(), CUDA)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"meta": {"pred_emb_dim": 48}, "runtime": {"attention": "varlen"}}, "a multiple of 8 channels, not 12"),
        ({"meta": {"embed_dim": 320}, "runtime": {"attention": "short"}}, "short takes heads of at most 64 channels, not 80"),
        ({"data": {"crop_size": 448}, "mask": {"patch_size": 16}, "runtime": {"attention": "short"}},
         "at most 256 tokens, not 784"),
    ],
)  # fmt: skip
def test_heads_and_lengths_that_cannot_run_are_refused_before_the_first_step(sections, says):
    config = small(**sections | {"runtime": BF16 | sections["runtime"]})
    with pytest.raises(ConfigError, match=rf"runtime\.attention: .*{says}; use auto"):
        check_compute(config, CUDA)


def test_evaluations_take_what_can_run_for_their_encoders_heads():
    for width, way in ((32, "varlen"), (48, "sdpa")):
        encoder = build_pair(small(meta={"embed_dim": width}))[1]
        use_auto_attention(encoder, CUDA, torch.bfloat16)
        assert {module.way for module in encoder.modules() if isinstance(module, Attention)} == {way}


def test_deterministic_algorithms_reach_flash_attention(monkeypatch):
    """The gradient of its queries is summed in no fixed order otherwise, and a run would not continue bit for bit."""
    kernels, asked = sys.modules["fastjepa_kernels.varlen_attention"], []
    package = type(sys)("flash_attn")
    package.flash_attn_varlen_func = lambda *packed, deterministic: asked.append(deterministic)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: asked.append(("asked", on)))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for on in (False, True):
        apply_process_settings(small(runtime={"deterministic": on}))
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda on=on: on)
        kernels.load("flash")()
    assert asked == [False, ("asked", True), True]
