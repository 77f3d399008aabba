"""The rules of every test: one thread, the same examples each time, and no skips but those of GPU tests."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start

os.environ.pop("PYTEST_XDIST_WORKER", None)  # a pytest that a test starts is no worker: pytest-benchmark would do nothing there

import hypothesis
import pytest
import torch

from tests.support.runs import write_config

hypothesis.settings.register_profile("house", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than about five seconds; `make test-slow` runs it")
    config.addinivalue_line("markers", "long: takes minutes, or repeats at full size what another test shows; `make test-long`")
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none, and the only test that may be")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse a pytest that keeps the group of a test from pytest-xdist: each process would make anew what a group shares."""
    if not getattr(session.config.option, "loadgroup", False):
        return
    lost = [item.nodeid for item in session.items if item.get_closest_marker("xdist_group") and "@" not in item.nodeid]
    if lost:
        raise pytest.UsageError(
            f"pytest {pytest.__version__} hides the group of {lost[0]} from pytest-xdist; install the versions of setup.py"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if not item.get_closest_marker("gpu"):
        _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    report = yield
    _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip or an expected failure into a failure: a test that did not run shows nothing."""
    if report.skipped or hasattr(report, "wasxfail"):
        reason = getattr(report, "wasxfail", None) or report.longrepr
        report.outcome = "failed"
        report.longrepr = f"only tests marked gpu may be skipped or expected to fail: {reason}"
        report.__dict__.pop("wasxfail", None)


@pytest.fixture(scope="session")
def toy_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config over 40 small images: five steps an epoch, ten in all."""
    return write_config(tmp_path_factory.mktemp("toy"))
