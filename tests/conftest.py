import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


def pytest_configure() -> None:
    """Give each of xdist's workers one thread: together they have as many as the machine has cores."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Start every test from the same random state, and leave none behind."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread: with another number its kernels add up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the charts of training runs, which take most of the time of a short run."""
    monkeypatch.setattr("bn_insert.training.results.write_curves", lambda _history, path: path.touch())
    monkeypatch.setattr("bn_insert.report.page.run_charts", lambda _runs: ())


@pytest.fixture
def unchecked() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a function without the tests' run-time type check: what a caller meets who passes another type."""
    return inspect.unwrap
