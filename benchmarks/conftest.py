"""`make bench`: the facts of the machine in the file of pytest-benchmark; the benches' options are in ops/conftest.py."""

from typing import Any

import results


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["measured_on"] = results.machine_facts() | {"versions": results.package_versions()}
