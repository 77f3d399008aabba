"""The ops run natively on a GPU, and in Triton's interpreter where there is none: one process, one of the two."""

import os
import sys

import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before its interpreter was chosen; run tests/ops in a process of its own")
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest

import fastjepa_kernels


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def triton_on_poisoned_memory():
    """Every test runs the kernels, and torch.empty is full of NaN (or the largest integer): nothing unwritten passes."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    fastjepa_kernels.use("triton")
    yield
    fastjepa_kernels.use("auto")
    torch.use_deterministic_algorithms(False)
