"""Every op and its gradient by every path: the kernel, its definition, compiled as one graph, replayed from a CUDA graph.

`make gpu-check` runs the comparison with the definitions before it measures anything, and under compute-sanitizer.
"""

import pytest
import torch
from paths import called, compiled, defined, outcome, replayed

from fastjepa_kernels.cases import CASES

pytestmark = pytest.mark.slow
COARSE = {"rtol": 0.02, "atol": 0.05}  # bf16 sums of many rows included; the tests of each op judge it by its rounding
EVERY = [(op, variant) for op, (_, variants) in CASES.items() for variant in range(len(variants))]


@pytest.fixture(autouse=True)
def on_device(device):
    with torch.device(device):
        yield


@pytest.mark.parametrize(("op", "variant"), EVERY)
def test_kernels_agree_with_their_definition(op, variant):
    torch.testing.assert_close(outcome(op, variant, called), outcome(op, variant, defined), **COARSE)


@pytest.mark.parametrize("op", CASES)
def test_a_compiled_op_is_the_same(op):
    torch.testing.assert_close(outcome(op, 0, compiled), outcome(op, 0, called))


@pytest.mark.gpu
@pytest.mark.parametrize("op", CASES)
def test_an_op_in_a_cuda_graph_is_the_same(op):
    torch.testing.assert_close(outcome(op, 0, replayed), outcome(op, 0, called))
