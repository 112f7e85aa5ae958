"""The fixtures of all tests. What they start, and how it is asked: tests/support."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import node_packages
import pytest
from browser import Page, chromium
from free_ports import free_port
from obedient_workers import ObedientWorkers
from processes import Starter, starting


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the combinations of parameters that ``@pytest.mark.leave_out(predicate)`` says make no sense."""
    gone = []
    for item in items:
        for mark in item.iter_markers("leave_out"):
            params = item.callspec.params  # type: ignore[attr-defined]
            if mark.args[0](**{name: params[name] for name in inspect.signature(mark.args[0]).parameters}):
                gone.append(item)
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in gone]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Report what the programs logged, and where those of the test alone stand, before the test's end stops them."""
    report = yield
    if report.failed:
        alone = getattr(item, "funcargs", {}).get("start")
        for starter in Starter.open:
            for process in starter.started:
                if starter is alone:
                    process.kill()
                text = process.log_end(150 if starter is alone else 10)
                report.sections.append((f"program {process.pid}", text))
    return report


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """pytest's own, which sees gunicorn's log also after another test of this process has made gunicorn's logger."""
    loggers = [logging.getLogger(name) for name in ("gunicorn.error", "gunicorn.access")]
    before = [(logger, logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    yield caplog
    for logger, propagate, level in before:
        logger.propagate = propagate
        logger.setLevel(level)


@pytest.fixture
def start() -> Iterator[Starter]:
    """Starts programs and ends them, also when the test fails."""
    with starting() as starter:
        yield starter


@pytest.fixture
def home(start: Starter) -> Path:
    """A directory of the test's own, where its programs run."""
    return start.home


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def obedient(start: Starter) -> Iterator[ObedientWorkers]:
    """Starts a program that does what the test tells each of its workers."""
    workers = ObedientWorkers(start)
    yield workers
    workers.close()


@pytest.fixture
def browser(start: Starter) -> Iterator[Callable[[], Page]]:
    """A headless Chromium of this test's own; calling it opens a tab."""
    with chromium(start) as new:
        yield new


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """The packages of tests/node/package-lock.json."""
    return node_packages.installed()
