"""How long a target may be silent: ``proxy_timeout`` and ``timeout``."""

import pytest
from free_ports import free_port
from proxy_laboratory import read_response, request
from upstream_sockets import Upstream, connect

from gunicorn_passenger import http_proxy
from gunicorn_passenger.proxy.options import Options


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ({}, 60),
        ({"proxy_timeout": 5}, 5),
        ({"proxy_timeout": None}, None),
        ({"timeout": 7}, 7),
        ({"timeout": 7, "proxy_timeout": 5}, 5),
        ({"timeout": 90}, 60),
        ({"timeout": 90, "proxy_timeout": None}, 90),
    ],
)
def test_the_seconds_of_a_silent_target(options, seconds):
    assert http_proxy.create_server(9000, **options).options.upstream_timeout == seconds
    assert Options().merged(options, "here").upstream_timeout == seconds


@pytest.mark.parametrize("mode", ["direct", "routed"])
@pytest.mark.parametrize("body", [b"", b"body"])
@pytest.mark.parametrize("option", ["timeout", "proxy_timeout"])
def test_a_silent_target_is_504(lab, mode, body, option):
    port = free_port()
    where = lab.serve(f"{port}, '127.0.0.1', {option}=0.2", mode)
    with Upstream(port) as upstream, connect(where) as client:
        client.send(request(method="POST" if body else "GET", body=body))
        upstream.accept().head()
        assert read_response(client).status == 504
    lab.wait_log("it has not responded for 0.2 s")
