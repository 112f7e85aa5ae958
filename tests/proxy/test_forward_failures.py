"""Copies of requests (``forward``) that their target does not take: the handlers of ``error`` are told."""

import pytest
from free_ports import free_port
from proxy_laboratory import Origin, get, request
from upstream_sockets import Upstream


@pytest.fixture
def lab(gunicorn):
    scene = gunicorn.scene()
    scene.run("""
        def failed(error, request, target):
            seen.append((type(error).__name__, request.path, str(target), error.elapsed >= 0))
            return Response("from the handler", 503)
    """)
    return scene


def test_a_target_that_refuses(lab):
    port, refusing = free_port(), free_port()
    with Origin(port):
        where = lab.serve(f"{port}, '127.0.0.1', forward='http://127.0.0.1:{refusing}'")
        lab.run("proxy.on('error', failed)")
        came = get(where, request("/x"))
        assert (came.status, came.text) == (200, b"ok")
        assert lab.wait_seen() == [("UpstreamRefused", "/x", f"http://127.0.0.1:{refusing}", True)]


def test_a_server_that_is_not_there(lab):
    lab.serve("None, forward='nothing-here'", where=(where := lab.place()))
    lab.run("proxy.on('error', failed)")
    assert get(where, request("/y")).status == 200
    assert lab.wait_seen() == [("UpstreamRefused", "/y", "nothing-here", True)]


@pytest.mark.parametrize(("options", "name"), [("", "UpstreamClosed"), (", timeout=0.2", "UpstreamTimeout")])
def test_a_target_that_does_not_respond(lab, options, name):
    port = free_port()
    with Upstream(port) as upstream:
        where = lab.serve(f"None, forward='http://127.0.0.1:{port}'{options}")
        lab.run("proxy.on('error', failed)")
        assert get(where, request("/z")).status == 200
        wire = upstream.accept()
        wire.head()
        if not options:
            wire.close()
        assert lab.wait_seen() == [(name, "/z", f"http://127.0.0.1:{port}", True)]


def test_a_handler_that_raises_is_logged(lab):
    lab.serve(f"None, forward='http://127.0.0.1:{free_port()}'", where=(where := lab.place()))
    lab.run("proxy.on('error', lambda *arguments: 1 / 0)")
    assert get(where).status == 200
    assert "ZeroDivisionError" in lab.wait_log("a handler of 'error' failed")
