"""The fixtures of the HTTP core's tests."""

import pytest
from http_settings_site import Served


@pytest.fixture
def serve(start):
    return lambda *arguments, **options: Served(start, *arguments, **options)
