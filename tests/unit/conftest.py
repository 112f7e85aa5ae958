"""The fixtures of the unit tests, which start no program (``test_unit_tests_start_no_program``)."""

from collections.abc import Iterator

import pytest
import sources


@pytest.fixture(scope="module", autouse=True)
def trees() -> Iterator[None]:
    """Syntax trees are kept for the tests of one module."""
    yield
    sources.forget()
