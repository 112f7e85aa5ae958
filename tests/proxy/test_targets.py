"""Where the proxy carries requests: the forms of targets, several of them, TLS, and the connections to them."""

import contextlib
import socket

import pytest
from conditions import wait_for
from free_ports import free_port
from http_client import fetch
from proxy_laboratory import (
    MODES,
    OK,
    Message,
    accept,
    answer,
    ask,
    get,
    has_ipv6,
    labels,
    read_response,
    refuse,
    request,
)
from upstream_sockets import Upstream, connect

from gunicorn_passenger import http_proxy

IPV6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6")


# --- forms of one target -----------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize(
    ("form", "path"),
    [
        ("{port}", "/x"),
        ("{port}, 'localhost'", "/x"),
        ("{port}, '127.0.0.1'", "/x"),
        ("'http://127.0.0.1:{port}'", "/x"),
        ("'http://localhost:{port}/'", "/x"),
        ("'HTTP://localhost:{port}/Base'", "/Base/x"),
        ("'ws://127.0.0.1:{port}/base'", "/base/x"),
        ("lambda request: {port}", "/x"),
        ("[{port}]", "/x"),
        ("{{'/': {port}}}", "/x"),
    ],
)
def test_a_target_on_tcp(lab, upstream, port, mode, form, path):
    got, came = ask(lab.serve(form.format(port=port), mode), upstream)
    assert (got.path, came.status, came.text) == (path, 200, b"ok")


@IPV6
@MODES
@pytest.mark.parametrize(
    ("form", "path"),
    [("{port}, '::1'", "/x"), ("'http://[::1]:{port}'", "/x"), ("'http://[::1]:{port}/base/'", "/base/x")],
)
def test_a_target_on_ipv6(lab, origins, mode, form, path):
    port = free_port()
    listener = socket.create_server(("::1", port), family=socket.AF_INET6)
    listener.settimeout(30)
    with contextlib.closing(listener):
        where = lab.serve(f"{form.format(port=port)}, change_origin=True", mode)
        with connect(where) as client:
            client.send(request())
            sock, _ = listener.accept()
            with contextlib.closing(sock):
                data = b""
                while b"\r\n\r\n" not in data:
                    data += sock.recv(4096)
                sock.sendall(OK)
                assert read_response(client).text == b"ok"
    got = Message(data)
    assert got.path == path
    assert got.get("host") == [f"[::1]:{port}"]


@MODES
@pytest.mark.parametrize(
    "form", ["'unix:{path}'", "lambda request: 'unix:{path}'", "['unix:{path}']", "{{'/': 'unix:{path}'}}"]
)
def test_a_target_on_a_unix_socket(lab, mode, form):
    path = lab.place()
    with Upstream(path) as upstream:
        got, came = ask(lab.serve(form.format(path=path), mode), upstream)
        assert (got.path, got.get("host"), came.text) == ("/x", ["example.org"], b"ok")


def test_a_unix_target_keeps_its_connection(lab, origins):
    path = lab.place()
    origin = origins(path)
    where = lab.serve(f"'unix:{path}'")
    for _ in range(3):
        assert get(where).text == b"ok"
    assert [number for number, _ in origin.requests] == [1, 1, 1]


def test_a_unix_target_that_is_not_there(lab):
    assert refuse(lab.serve(f"'unix:{lab.place()}'")).status == 502


def test_a_name_that_does_not_resolve(lab):
    assert refuse(lab.serve("'http://no-such-host.invalid:9'")).status == 502
    assert "Traceback" not in lab.wait_log("no-such-host.invalid")


@pytest.mark.parametrize(
    "target",
    [
        0, 70000, -1, True, None, "", "ftp://x", "http://", "http://x:y", "http://x:0", "http://x:65536", "unix:", 1.5,
        "http://a b", "http://x/a b", "http://x/\r\nA: b", "http://[::1", "http://x/\u20ac", [], {}, [9000, 0], [None],
        {"/": 0}, {"/": {"target": 0}}, {"/": {}}, b"http://x", "http:x", "//x:9000",
    ],
)  # fmt: skip
def test_targets_that_cannot_be_used(target):
    with pytest.raises(ValueError, match="target"):
        http_proxy.create_server(target)


@pytest.mark.parametrize("host", ["a b", "", 5, "a/b", "a\r\nb", "http://a"])
def test_hosts_that_cannot_be_used(host):
    with pytest.raises(ValueError, match=r"host|target"):
        http_proxy.create_server(9000, host)


# --- a server of this application --------------------------------------------------------------------


METRICS = """
def metrics(environ, start_response):
    start_response("200 OK", [])
    return [environ["PATH_INFO"].encode(), b" of ", str(environ["SERVER_PORT"]).encode()]
server = passenger.create_server(metrics)
"""


@MODES
def test_a_target_by_the_name_of_a_server(lab, mode):
    name = f"metrics-{lab.number}"
    lab.run(METRICS)
    where = lab.serve(f"{name!r}", mode)
    # the proxy looks for it at each request; it does not exist yet
    assert refuse(where).status == 502
    lab.run(f"server.listen('auto', name={name!r}) and None")
    port = lab.run("server.address[1]")
    for _ in range(2):
        came = get(where)
        assert (came.status, came.text.decode()) == (200, f"/x of {port}")
    lab.run("server.close()")
    assert refuse(where).status == 502
    assert "Traceback" not in lab.log()


@pytest.mark.parametrize("kind", ["port", "unix"])
def test_a_server_with_a_name_on_any_address(lab, kind):
    name = f"named-{lab.number}"
    address = free_port() if kind == "port" else f"unix:{lab.place()}"
    lab.run(METRICS)
    lab.run(f"server.listen({address!r}, name={name!r}) and None")
    assert get(lab.serve(f"{name!r}")).text.startswith(b"/x of ")


def test_a_list_and_a_function_may_give_a_name(lab):
    name = f"listed-{lab.number}"
    lab.run(METRICS)
    lab.run(f"server.listen('auto', name={name!r}) and None")
    assert get(lab.serve(f"[{name!r}]")).status == 200
    assert get(lab.serve(f"lambda request: {name!r}")).status == 200
    assert get(lab.serve(f"{{'/': {name!r}}}")).status == 200


def test_two_servers_as_the_documentation_has_it(start):
    """The primary is a proxy to a server with a name, in two workers."""
    start.write(
        "program.py",
        """
import gunicorn_passenger as passenger
from gunicorn_passenger import http_proxy

def metrics(environ, start_response):
    start_response("200 OK", [])
    return [b"metrics"]

application = http_proxy.create_server("metrics").listen("passenger")
passenger.create_server(metrics).listen("auto", name="metrics")
""",
    )
    process = start.gunicorn("program", workers=2).wait_ready()
    for _ in range(5):
        assert fetch(process.socket) == (200, "metrics")


# --- functions ---------------------------------------------------------------------------------------


@MODES
def test_a_function_chooses(lab, origins, mode):
    ports, path = [free_port() for _ in range(2)], lab.place()
    origins(ports[0], b"port")
    based = origins(ports[1], b"url")
    origins(path, b"unix")
    lab.run(f"""
def choose(request):
    assert isinstance(request, Request)
    seen.append((request.method, request.path, request.headers["Host"], request.args.get("q")))
    return {{"/port": {ports[0]}, "/url": "http://127.0.0.1:{ports[1]}/base", "/unix": "unix:{path}",
             "/list": [{ports[0]}, {ports[0]}], "/none": None}}[request.path]
""")
    where = lab.serve("choose", mode)
    for form in ("port", "url", "unix"):
        assert get(where, request(f"/{form}?q=1")).text == form.encode()
    assert get(where, request("/list")).text == b"port"
    assert based.paths == ["/base/url?q=1"]
    assert lab.seen()[0] == ("GET", "/port", "example.org", "1")
    assert len(lab.seen()) == 4
    assert refuse(where, request("/none")).status == 404
    assert "Traceback" not in lab.log()
    assert refuse(where, request("/missing")).status == 500
    assert "KeyError" in lab.wait_log("KeyError")


def test_a_function_shares_the_connections(lab, origins, port):
    origin = origins(port)
    where = lab.serve(f"lambda request: {port}")
    assert labels(where, 3) == [b"ok"] * 3
    assert {number for number, _ in origin.requests} == {1}


def test_a_function_that_returns_a_list_takes_turns(lab, pair):
    where = lab.serve(f"lambda request: {pair[0]}")
    assert len(set(labels(where, 4))) == 2


@pytest.mark.parametrize(
    "value", ["0", "'ftp://x'", "70000", "1.5", "object()", "''", "'http://x/\\r\\nA: b'"]
)
def test_a_function_that_returns_nonsense(lab, value):
    where = lab.serve(f"lambda request: {value}")
    with connect(where) as client:
        client.send(request(method="POST", body=b"GET /smuggled HTTP/1.1\r\n\r\n"))
        assert read_response(client).status == 500
    lab.wait_log("[ERROR]")


def test_a_slow_function_holds_up_no_other_request(lab, origins, port):
    origins(port)
    lab.run("gate = gevent.event.Event()\nhere = []")
    lab.run(f"""
def choose(request):
    if request.path == "/slow":
        here.append(1)
        gate.wait()
    return {port}
""")
    where = lab.serve("choose")
    with connect(where) as slow:
        slow.send(request("/slow"))
        wait_for(lambda: lab.run("here"), "the slow one")
        assert get(where, request("/fast")).text == b"ok"
        lab.run("gate.set()")
        assert read_response(slow).text == b"ok"


def test_a_function_for_an_upgrade(lab, upstream, port):
    where = lab.serve(f"lambda request: {port} if request.headers.get('Upgrade') else None")
    with connect(where) as client:
        wire = accept(upstream, client.send(request("/x", "Connection: Upgrade", "Upgrade: x")))
        assert Message(wire.head()).get("upgrade") == ["x"]
        wire.send(answer("403 No"))
        assert read_response(client).status == 403
    assert refuse(where).status == 404


# --- tables ------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("order", [1, -1])
def test_the_longest_prefix_wins(lab, origins, mode, order):
    table = {prefix: free_port() for prefix in ["/", "/api/", "/api/v2/", "/static"][::order]}
    for prefix, port in table.items():
        origins(port, prefix.encode())
    where = lab.serve(f"{table}", mode)
    for path, expected in [
        ("/", "/"), ("/x", "/"), ("/ap", "/"), ("/apix", "/"), ("/api/", "/api/"), ("/api/x", "/api/"),
        ("/api/v2", "/api/"), ("/api/v2/", "/api/v2/"), ("/api/v2/x?y", "/api/v2/"), ("/x?/api/", "/"),
        ("/static", "/static"), ("/static/x", "/static"), ("/API/", "/"), ("/x/api/", "/"),
    ]:  # fmt: skip
        assert get(where, request(path)).text == expected.encode(), path


@MODES
def test_no_prefix_matches(lab, origins, port, mode):
    origin = origins(port)
    where = lab.serve(f"{{'/api/': {port}}}", mode)
    assert get(where, request("/api/x")).status == 200
    for path in ("/", "/other", "/ap", "/api?x"):
        assert refuse(where, request(path)).status == 404
    assert origin.paths == ["/api/x"]
    assert "Traceback" not in lab.log()


def test_404_leaves_the_clients_connection_in_order(lab, origins, port):
    origin = origins(port)
    where = lab.serve(f"{{'/api/': {port}}}")
    with connect(where) as client:
        client.send(request("/no", method="POST", body=b"GET /api/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"))
        assert read_response(client).status == 404
        client.finish()
        client.rest()
    assert origin.paths == []


@MODES
@pytest.mark.parametrize(
    ("prefix", "value", "path", "expected"),
    [
        ("/api/", "{port}", "/api/x?q", "/api/x?q"),
        ("/api/", "'http://127.0.0.1:{port}/base'", "/api/x?q", "/base/api/x?q"),
        ("/api/", "{{'target': {port}}}", "/api/x", "/api/x"),
        ("/api/", "{{'target': {port}, 'remove_prefix': False}}", "/api/x", "/api/x"),
        ("/api/", "{{'target': {port}, 'remove_prefix': True}}", "/api/x?q=/api/", "/x?q=/api/"),
        ("/api/", "{{'target': {port}, 'remove_prefix': True}}", "/api/", "/"),
        ("/api/", "{{'target': {port}, 'remove_prefix': True}}", "/api/?q", "/?q"),
        ("/api/", "{{'target': {port}, 'remove_prefix': True}}", "/api/api/x", "/api/x"),
        ("/api/", "{{'target': {port}, 'remove_prefix': True}}", "/api/a%2Fb%20c", "/a%2Fb%20c"),
        ("/api/", "{{'target': {port}, 'remove_prefix': True}}", "/api/caf%C3%A9", "/caf%C3%A9"),
        ("/api/", "{{'target': 'http://127.0.0.1:{port}/base', 'remove_prefix': True}}", "/api/x", "/base/x"),
        ("/api/", "{{'target': 'http://127.0.0.1:{port}/base/', 'remove_prefix': True}}", "/api/", "/base/"),
        ("/api", "{{'target': {port}, 'remove_prefix': True}}", "/api/x", "/x"),
        ("/api", "{{'target': {port}, 'remove_prefix': True}}", "/api", "/"),
        ("/", "{{'target': {port}, 'remove_prefix': True}}", "/x", "/x"),
    ],
)
def test_what_is_asked_for_under_a_prefix(lab, upstream, port, mode, prefix, value, path, expected):
    where = lab.serve(f"{{{prefix!r}: {value.format(port=port)}}}", mode)
    got, came = ask(where, upstream, request(path))
    assert got.path == expected
    assert came.status == 200


@pytest.mark.parametrize("path", ["//evil.example/x", "/api//evil.example/x"])
def test_what_is_left_of_the_prefix_is_a_path(lab, upstream, port, path):
    """Two slashes at its beginning do not begin an authority."""
    where = lab.serve(f"{{'/api/': {{'target': {port}, 'remove_prefix': True}}, '/': {port}}}")
    got, _ = ask(where, upstream, request(path))
    assert got.path == path.removeprefix("/api")
    assert got.get("host") == ["example.org"]


def test_options_for_a_prefix(lab, origins):
    ports = [free_port() for _ in range(3)]
    targets = [origins(port) for port in ports]
    table = f"""{{
        "/a/": {{"target": {ports[0]}, "change_origin": True, "headers": {{"X-A": "1"}}, "auth": "u:p"}},
        "/b/": {{"target": {ports[1]}, "xfwd": False}},
        "/c/": {ports[2]},
        "/off/": {{"target": {ports[2]}, "ws": False}},
    }}""".replace("\n", "")
    where = lab.serve(f"{table}, xfwd=True, headers={{'X-All': '1'}}")
    for path in ("/a/", "/b/", "/c/"):
        assert get(where, request(path)).status == 200
    a, b, c = (target.requests[0][1] for target in targets)
    assert (a.get("host"), a.get("x-a"), len(a.get("authorization"))) == ([f"localhost:{ports[0]}"], ["1"], 1)
    assert (a.get("x-forwarded-for"), b.get("x-forwarded-for")) == (["127.0.0.1"], [])
    assert (b.get("x-a"), b.get("x-all"), b.get("host")) == ([], ["1"], ["example.org"])
    assert (c.get("x-forwarded-for"), c.get("x-all"), c.get("authorization")) == (["127.0.0.1"], ["1"], [])
    assert refuse(where, request("/off/", "Connection: Upgrade", "Upgrade: x")).status == 501


def test_a_prefix_with_several_targets_or_a_function(lab, pair):
    ports, _ = pair
    where = lab.serve(
        f"{{'/list/': {ports}, '/f/': lambda request: {ports[0]}, '/d/': {{'target': {ports}}}}}"
    )
    assert len(set(labels(where, 2, request("/list/")))) == 2
    assert len(set(labels(where, 2, request("/d/")))) == 2
    assert set(labels(where, 2, request("/f/"))) == {str(ports[0]).encode()}


@pytest.mark.parametrize(
    ("table", "error", "said"),
    [
        ({"/": {"target": 9000, "nonsense": 1}}, TypeError, "nonsense"),
        ({"/": {"target": 9000, "proxy_timeout": -1}}, ValueError, "proxy_timeout"),
        ({"/": {"target": 9000, "remove_prefix": "no"}}, ValueError, "remove_prefix"),
        ({"/": {"change_origin": True}}, ValueError, "target"),
        ({5: 9000}, ValueError, "target"),
    ],
)
def test_tables_that_cannot_be_used(table, error, said):
    with pytest.raises(error, match=said):
        http_proxy.create_server(table)


# --- the address to connect from ---------------------------------------------------------------------


@MODES
def test_local_address(lab, origins, port, mode):
    origin = origins(port)
    assert get(lab.serve(f"{port}, '127.0.0.1', local_address='127.0.0.9'", mode)).status == 200
    assert [peer[0] for peer in origin.peers] == ["127.0.0.9"]


def test_local_address_that_this_machine_has_not(lab, origins, port):
    origins(port)
    assert refuse(lab.serve(f"{port}, '127.0.0.1', local_address='192.0.2.1'")).status == 502
    assert "Traceback" not in lab.wait_log("(GET /x): 502")


def test_local_address_of_the_other_family_does_not_hinder_a_name(lab, origins, port):
    """localhost may be ::1 first; only 127.0.0.1 can be reached from 127.0.0.9."""
    origin = origins(port)
    assert get(lab.serve(f"'http://localhost:{port}', local_address='127.0.0.9'")).status == 200
    assert [peer[0] for peer in origin.peers] == ["127.0.0.9"]
