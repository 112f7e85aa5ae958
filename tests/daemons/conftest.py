"""The fixtures of the tests of daemons."""

import pytest
from daemon_site import Site


@pytest.fixture
def site(start):
    return Site(start)
