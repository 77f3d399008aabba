"""The dtype of a run: bf16 where the device has instructions for it, whatever `runtime.dtype: auto` is read on."""

import pytest
import torch

from fastjepa.config.load import config_from_dict
from fastjepa.engine.precision import EMULATED_BF16, settle_dtype
from fastjepa.run.build import run_warnings

CPU = torch.device("cpu")


def config(dtype):
    return config_from_dict({"runtime": {"dtype": dtype, "device": "cpu"}})


@pytest.mark.parametrize(
    ("instructions", "dtype"), [({"avx512_bf16": True}, "bf16"), ({"avx2": True, "amx_bf16": False}, "fp32")]
)
def test_auto_is_bf16_where_the_cpu_has_instructions_for_it(instructions, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    settled = settle_dtype("auto", CPU)
    assert settled == dtype


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_asked_for_stays(dtype):
    assert settle_dtype(dtype, CPU) == dtype


@pytest.mark.parametrize(("has", "said"), [(False, True), (True, False)])
def test_a_run_that_asks_a_cpu_without_them_for_bf16_is_told(has, said, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has})
    assert (EMULATED_BF16 in run_warnings(config("bf16"), CPU)) == said
    assert not run_warnings(config("fp32"), CPU)
