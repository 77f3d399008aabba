"""`pytest benchmarks/ops/bench_*.py [--toy] [--device cpu]`: each op against its rivals, timed as protocol.py says."""

from collections.abc import Callable
from functools import partial

import protocol
import pytest
import torch

import fastjepa_kernels
from fastjepa_kernels import dispatch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--toy", action="store_true", help="tiny sizes and few rounds: to see that everything runs")
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def pytest_configure(config: pytest.Config) -> None:
    config.setting = protocol.Setting(torch.device(config.getoption("--device")), config.getoption("--toy"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Call the bench of an op for each of its providers, and where it asks for a direction in both."""
    if "bench" in metafunc.fixturenames:
        metafunc.parametrize("provider", metafunc.module.PROVIDERS)
    if "direction" in metafunc.fixturenames:
        metafunc.parametrize("direction", protocol.DIRECTIONS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        group = f"{item.path.stem.removeprefix('bench_')} {item.callspec.params.get('direction', 'forward')}"
        item.add_marker(pytest.mark.benchmark(timer=config.setting.clock, group=group))


@pytest.fixture
def bench(provider: str, benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return bench(make_inputs, direction), which times the provider that the test is called for."""
    benchmark.extra_info.update(op=request.path.stem.removeprefix("bench_"), provider=provider)
    fastjepa_kernels.use("triton" if dispatch.INTERPRETED else "auto")  # the interpreter is chosen to see the kernels run
    yield partial(protocol.measure_provider, benchmark, request.config.setting, request.module.PROVIDERS[provider])
    fastjepa_kernels.use("auto")
