"""`make bench`: what pytest-benchmark's file says of the machine; the benches' options are in ops/conftest.py."""

from typing import Any

import results


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["measured_on"] = results.machine() | {"versions": results.versions()}
