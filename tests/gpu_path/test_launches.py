"""Launchers of the ops, on a fake card: what they return, where they launch, and the cases of `make gpu-check`."""

import pytest

from tests.support.card_cases import faults_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_launchers_return_what_their_op_says_and_launch_on_the_card_of_their_tensors(device):
    """Also with a default device, compiled as one graph, and in a capture; "cuda:1" is not the current card."""
    assert faults_of("launches", device) == {}
