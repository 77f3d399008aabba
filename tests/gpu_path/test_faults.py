"""The fake card sees the faults that it is for: reads, copies that wait, devices that differ, a capture that waits."""

import pytest

from tests.support.card_cases import faults_of

pytestmark = pytest.mark.slow


def test_the_fake_card_sees_what_a_card_would_wait_for_or_refuse():
    assert faults_of("faults") == {}
