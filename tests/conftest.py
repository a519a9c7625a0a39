"""What all tests share. torch is imported by the workers: the process that starts them has no other use for it."""

# ruff: noqa: PLC0415

import gc
import inspect
import os
from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import config, install_import_hook

from support.charts import leave_out_charts


def annotating_shapes() -> list[str]:
    """Return the modules of bn_insert that annotate shapes, from their source: importing them would be too early."""
    spec = find_spec("bn_insert")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    return [
        ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for path in sorted(package.rglob("*.py"))
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    ]


# Shapes and dtypes are checked at run time. The types of other modules are those that mypy checks: to check them here
# too, on each operation of a traced network, took a quarter of the time of the tests.
install_import_hook(annotating_shapes(), "beartype.beartype")


def pytest_configure() -> None:
    """Give each of xdist's workers one thread: together they have as many as the machine has cores."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector from the modules of torch and the tests, which stay: a quarter of the collection."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    # What is imported later, for the first trace and the first chart, stays too, and was searched every few tests.
    gc.set_threshold(700, 10, 100)
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave out what hypothesis does at the end, unless it has something to say: it imports all of itself for that."""
    if session.testsfailed or session.config.getoption("hypothesis_show_statistics", default=False):
        gc.unfreeze()  # what it imports asks the garbage collector for references
    elif (plugin := session.config.pluginmanager.get_plugin("hypothesispytest")) is not None:
        session.config.pluginmanager.unregister(plugin)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Start every test from the same random state, and leave none behind."""
    import torch

    with torch.random.fork_rng(devices=()):
        # Not torch.manual_seed: for each kind of GPU that is not there, it formats and keeps the stack of the call.
        torch.default_generator.manual_seed(0)
        yield


# Whose tests run the functions of the other folders, where shapes are checked, through commands and training runs.
UNCHECKED = {"cli", "demo", "docs", "end_to_end", "report", "training"}


@pytest.fixture(autouse=True)
def _shapes_checked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check shapes and dtypes at run time where functions are tested one by one."""
    folder = request.path.relative_to(Path(__file__).parent).parts[0]
    config.update("jaxtyping_disable", folder in UNCHECKED)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread: with another number its kernels add up in another order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out charts, which take most of the time of a short run and of a page."""
    leave_out_charts(monkeypatch)


@pytest.fixture(scope="module")
def no_charts_in_module() -> Iterator[None]:
    """Do the same in all of a module, and in its fixtures that run only once."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        leave_out_charts(monkeypatch)
        yield


@pytest.fixture
def unchecked() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a function without the tests' run-time type check: what a caller meets who passes another type."""
    return inspect.unwrap
