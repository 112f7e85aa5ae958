"""Targets whose host name is not looked up in time, and requests whose client goes while they wait."""

import contextlib

import pytest
from conditions import wait_for
from free_ports import free_port
from proxy_laboratory import Origin, get, read_response, request
from upstream_sockets import Upstream, connect


@pytest.fixture
def dead_name(lab):
    """Makes a host name whose name server is silent until the test is over; its name is returned."""
    name = f"slow{lab.number}.test"  # what an earlier test has looked up is remembered
    lab.run(f"""
        import _socket, threading
        from gevent import monkey
        asked, over = [], monkey.get_original("_thread", "allocate_lock")()
        over.acquire()
        real = _socket.getaddrinfo

        def getaddrinfo(host, *arguments):
            if host != {name!r} or arguments[-1] & 4:
                return real(host, *arguments)
            asked.append(host)
            over.acquire()
            over.release()
            return real("127.0.0.1", *arguments)

        _socket.getaddrinfo = getaddrinfo
    """)
    yield name
    lab.run("_socket.getaddrinfo = real; over.release()")


def test_a_dead_name_delays_no_other_target(lab, dead_name):
    port = free_port()
    with Origin(port), contextlib.ExitStack() as stack:
        slow = lab.serve(f"'http://{dead_name}:{port}'")
        plain = lab.serve(f"'http://127.0.0.1:{port}'")
        named = lab.serve(f"'http://localhost:{port}'")
        waiting = [stack.enter_context(connect(slow)) for _ in range(40)]
        for client in waiting:
            client.send(request())
        wait_for(lambda: lab.run("asked"), "the look-up")
        for where in plain, named:
            for _ in range(3):
                assert get(where).status == 200
        assert lab.run("asked") == [dead_name]
        assert all(not client.data for client in waiting)


def test_a_copy_for_a_dead_name_delays_no_request(lab, dead_name):
    port = free_port()
    with Origin(port):
        where = lab.serve(f"{port}, '127.0.0.1', forward='http://{dead_name}:{port}'")
        for _ in range(40):
            assert get(where, request(body=b"body", method="POST")).status == 200


def test_a_client_that_goes_while_the_name_is_looked_up_ends_its_request(lab, dead_name):
    where = lab.serve(f"'http://{dead_name}:{free_port()}'")
    lab.run("proxy.on('econnreset', lambda error, request, target: seen.append(str(target)))")
    with connect(where) as client:
        client.send(request())
        wait_for(lambda: lab.run("asked"), "the look-up")
    assert dead_name in lab.wait_seen()[0]


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("body", [b"", b"body"])
def test_a_client_that_goes_while_it_waits_for_a_connection_is_not_forwarded(lab, transport, body):
    port = free_port()
    where = free_port() if transport == "tcp" else lab.place()
    lab.serve(f"{port}, '127.0.0.1', agent=http_proxy.Agent(max_connections=1)", where=where)
    lab.run("proxy.on('econnreset', lambda error, request, target: seen.append(request.path))")
    with Upstream(port) as upstream, connect(where) as first, connect(where) as last:
        first.send(request("/first"))
        wire = upstream.accept()
        assert b"/first" in wire.head()
        for number in range(5):
            with connect(where) as client:
                client.send(request(f"/{number}", method="POST" if body else "GET", body=body))
                wait_for(
                    lambda: (
                        lab.run(
                            "sum(pool.used + len(pool._waiters) for pool in "
                            "proxy.options.agent._pools.values())"
                        )
                        >= 2
                    ),
                    "the request to wait",
                )
        assert sorted(lab.wait_seen(5)) == [f"/{number}" for number in range(5)]
        last.send(request("/last"))
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        wire.send(answer)
        assert read_response(first).status == 200
        assert b"/last" in wire.head()
        wire.send(answer)
        assert read_response(last).status == 200
