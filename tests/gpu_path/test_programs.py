"""Programs on a fake card: training with its log, probes and checkpoints; evaluations; the timing of the benchmarks."""

import pytest

from tests.support.card_cases import faults_of

pytestmark = pytest.mark.slow


def test_programs_run_on_a_card_and_a_run_waits_only_to_log_probe_and_save():
    assert faults_of("programs") == {}
