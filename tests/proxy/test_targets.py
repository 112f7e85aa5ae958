"""Where the proxy carries requests: the forms of targets, several of them, TLS, and the connections to them."""

import base64
import contextlib
import http.client
import re
import select
import socket
import ssl
import threading
import time

import pytest
import trustme
from conftest import Client, fetch, free_port, wait_for
from proxy_laboratory import (
    OK,
    Message,
    Origin,
    accept,
    answer,
    ask,
    get,
    has_ipv6,
    laboratory,
    read_request,
    read_response,
    refuse,
    request,
)
from upstream_sockets import Upstream, connect

from gunicorn_passenger import http_proxy

MODES = pytest.mark.parametrize("mode", ["direct", "routed"])
IPV6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6")


@pytest.fixture(scope="module")
def gunicorn():
    with laboratory() as lab:
        yield lab


@pytest.fixture
def lab(gunicorn):
    return gunicorn.scene()


@pytest.fixture
def upstream(port):
    with Upstream(port) as upstream:
        yield upstream


@pytest.fixture
def origins():
    """Makes targets that answer by themselves, and ends them."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(Origin(*arguments, **options))


# --- forms of one target -------------------------------------------------------------------------


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


# --- a server of this application ----------------------------------------------------------------

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
    # it is looked up for each request: there is none yet
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


# --- several targets -----------------------------------------------------------------------------


def labels(where, count, sent=None):
    """The bodies of so many requests, one after another."""
    found = []
    for _ in range(count):
        came = get(where, sent)
        assert came.status == 200, came
        found.append(came.text)
    return found


@MODES
@pytest.mark.parametrize("options", ["", ", balance='round_robin'"])
def test_round_robin(lab, origins, mode, options):
    ports = [free_port() for _ in range(3)]
    for number, port in enumerate(ports):
        origins(port, b"%d" % number)
    found = labels(lab.serve(f"{ports}{options}", mode), 9)
    for begin in range(0, 9, 3):
        assert set(found[begin : begin + 3]) == {b"0", b"1", b"2"}


def test_targets_of_different_forms(lab, origins):
    ports, path = [free_port() for _ in range(2)], lab.place()
    origins(ports[0], b"port")
    origins(path, b"unix")
    based = origins(ports[1], b"url")
    where = lab.serve(f"[{ports[0]}, 'unix:{path}', 'http://127.0.0.1:{ports[1]}/base']")
    assert set(labels(where, 3)) == {b"port", b"unix", b"url"}
    assert based.paths == ["/base/x"]


@MODES
def test_least_connections(lab, mode):
    ports = [free_port() for _ in range(2)]
    where = lab.serve(f"{ports}, balance='least_connections'", mode)
    with Upstream(ports[0]) as first, Upstream(ports[1]) as second, connect(where) as held:
        held.send(request("/held"))
        ready, _, _ = select.select([first.listener, second.listener], [], [], 30)
        busy, idle = (first, second) if first.listener in ready else (second, first)
        wire = busy.accept()
        read_request(wire)
        # while that one is in hand, all others go to the target that has none
        for _ in range(4):
            with connect(where) as client:
                client.send(request("/more", "Connection: close"))
                other = accept(idle, client)
                assert read_request(other).path == "/more"
                other.send(answer("200 OK", "Connection: close"))
                assert read_response(client).status == 200
        wire.send(OK)
        assert read_response(held).status == 200


@pytest.mark.parametrize("body", [b"", b"hello", b"0123456789" * 50000])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_request_whose_target_refuses_goes_to_another(lab, origins, body, framing):
    dead, live = free_port(), free_port()
    origin = origins(live, b"live")
    where = lab.serve(f"[{dead}, {live}], fail_timeout=0.001")
    if framing == "chunked":
        chunks = (b"%x\r\n%s\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n"
        sent = request("/x", "Transfer-Encoding: chunked", method="POST") + chunks
    else:
        sent = request(method="POST", body=body)
    assert labels(where, 6, sent) == [b"live"] * 6
    assert all(message.text == body for _, message in origin.requests)
    assert len(origin.requests) == 6


def test_a_dead_target_is_skipped(lab, origins):
    ports = [free_port() for _ in range(2)]
    origins(ports[0], b"live")
    where = lab.serve(f"{ports}, fail_timeout=1000")
    assert labels(where, 2) == [b"live"] * 2
    # it is there again, but not asked for a while
    back = origins(ports[1], b"back")
    assert labels(where, 6) == [b"live"] * 6
    assert back.requests == []
    assert back.peers == []


def test_a_dead_target_returns(lab, origins):
    ports = [free_port() for _ in range(2)]
    origins(ports[0], b"live")
    where = lab.serve(f"{ports}, fail_timeout=0.1")
    assert labels(where, 4) == [b"live"] * 4
    origins(ports[1], b"back")
    wait_for(lambda: labels(where, 1) == [b"back"], "the target to return")
    wait_for(lambda: set(labels(where, 2)) == {b"live", b"back"}, "the targets to take turns")


def test_a_target_is_not_skipped_when_there_is_no_other(lab, origins):
    ports = [free_port() for _ in range(2)]
    where = lab.serve(f"{ports}, fail_timeout=1000")
    for _ in range(3):
        assert refuse(where).status == 502
    origins(ports[1], b"back")
    assert labels(where, 4) == [b"back"] * 4


def test_a_lone_target_is_never_skipped(lab, origins, port):
    where = lab.serve(f"{port}, fail_timeout=1000")
    assert refuse(where).status == 502
    origins(port)
    assert get(where).status == 200


def test_an_answer_of_500_or_a_closed_connection_is_no_refusal(lab):
    """A request that was sent is not given to another target."""
    ports = [free_port() for _ in range(2)]
    where = lab.serve(f"{ports}, fail_timeout=1000")
    with Upstream(ports[0]) as first, Upstream(ports[1]) as second, connect(where) as client:
        client.send(request(method="POST", body=b"hello"))
        ready, _, _ = select.select([first.listener, second.listener], [], [], 30)
        hit, other = (first, second) if first.listener in ready else (second, first)
        wire = hit.accept()
        read_request(wire)
        wire.close()
        assert read_response(client).status == 502
        assert not other.connects_within(0.2)


# --- sticky --------------------------------------------------------------------------------------


def sticky_cookie(message, name="passenger_target"):
    """The cookie that the proxy set: its value and its attributes."""
    (text,) = [value for value in message.get("set-cookie") if value.startswith(name + "=")]
    first, *attributes = [part.strip() for part in text.split(";")]
    return first.partition("=")[2], {a.lower() for a in attributes}


@pytest.fixture
def pair(origins):
    """Two targets, by their labels."""
    ports = [free_port() for _ in range(2)]
    return ports, [origins(port, str(port).encode()) for port in ports]


@MODES
def test_a_client_stays_with_its_target(lab, pair, mode):
    ports, _ = pair
    where = lab.serve(f"{ports}, sticky='cookie'", mode)
    seen = set()
    for _ in range(4):
        first = get(where)
        value, attributes = sticky_cookie(first)
        assert {"httponly", "path=/", "samesite=lax"} <= attributes
        assert not any(a.startswith("domain") for a in attributes)
        seen.add((first.text, value))
        assert labels(where, 4, request("/x", f"Cookie: passenger_target={value}")) == [first.text] * 4
    # both targets, each with a cookie of its own
    assert len(dict(seen)) == 2
    assert len({value for _, value in seen}) >= 2


def test_without_sticky_there_is_no_cookie(lab, pair):
    assert get(lab.serve(f"{pair[0]}")).get("set-cookie") == []


def test_the_sticky_cookie_does_not_tell_the_address(lab, pair):
    ports, _ = pair
    targets = [f"http://127.0.0.1:{port}" for port in ports]
    where = lab.serve(f"{targets}, sticky='cookie'")
    for _ in range(2):
        value, _ = sticky_cookie(get(where))
        texts = [value.encode(), bytes.fromhex(value) if re.fullmatch("([0-9a-fA-F]{2})+", value) else b""]
        for decode in (base64.b64decode, base64.urlsafe_b64decode):
            with contextlib.suppress(ValueError):
                texts.append(decode(value + "=" * (-len(value) % 4)))
        for text in texts:
            for port in ports:
                assert str(port).encode() not in text
                assert port.to_bytes(2, "big") not in text or len(text) > 8
            assert b"127.0.0.1" not in text
            assert b"http" not in text
        assert len(value) > 2  # no index into the list


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ("passenger_target={}", []),
        ("a=1; passenger_target={}; b=2", ["a=1; b=2"]),
        ("passenger_target={}; b=2", ["b=2"]),
        ("a=1; passenger_target={}", ["a=1"]),
        ("a=1; xpassenger_target=5; passenger_target={}", ["a=1; xpassenger_target=5"]),
    ],
)
def test_the_sticky_cookie_is_not_sent_to_the_target(lab, pair, sent, expected):
    ports, targets = pair
    where = lab.serve(f"{ports}, sticky='cookie'")
    value, _ = sticky_cookie(get(where))
    get(where, request("/second", "Cookie: " + sent.format(value)))
    (got,) = [m for origin in targets for _, m in origin.requests if m.path == "/second"]
    assert got.get("cookie") == expected


@pytest.mark.parametrize(
    "value",
    ["0", "1", "{0}", "http://127.0.0.1:{0}", "nonsense", "", '"x"', "\u00e9", "a" * 4000, "base64", "cut"],
)
def test_a_forged_sticky_cookie_is_ignored(lab, pair, value):
    ports, targets = pair
    where = lab.serve(f"{ports}, sticky='cookie'")
    if value == "base64":
        value = base64.b64encode(f"http://localhost:{ports[0]}".encode()).decode()
    elif value == "cut":
        value = sticky_cookie(get(where))[0][:-1]
    value = value.format(*ports)
    sent = request("/x", f"Cookie: passenger_target={value}")
    came = [get(where, sent) for _ in range(4)]
    assert {message.status for message in came} == {200}
    # shared out as if there were none, and each told where it is now
    assert len({message.text for message in came}) == 2
    for message in came:
        assert sticky_cookie(message)[0]


def test_the_cookie_of_the_target_is_kept_beside_the_sticky_one(lab, port):
    where = lab.serve(
        f"[{port}, {port}], sticky='cookie', cookie_domain_rewrite='', cookie_path_rewrite='/only'"
    )
    with Upstream(port) as upstream:
        _, came = ask(
            where, upstream, request(), answer("200 OK", "Set-Cookie: own=1; Path=/y; Domain=a.example")
        )
    assert "own=1; Path=/only" in came.get("set-cookie")
    assert "path=/" in sticky_cookie(came)[1]


def test_the_sticky_cookies_name(lab, pair):
    where = lab.serve(f"{pair[0]}, sticky='cookie', sticky_name='there'")
    first = get(where)
    value, _ = sticky_cookie(first, "there")
    assert len(first.get("set-cookie")) == 1
    assert labels(where, 4, request("/x", f"Cookie: there={value}")) == [first.text] * 4


def test_the_target_of_a_sticky_client_dies(lab, origins):
    ports = [free_port() for _ in range(2)]
    origins(ports[0], b"live")
    with Origin(ports[1], b"dies"):
        where = lab.serve(f"{ports}, sticky='cookie', fail_timeout=1000")
        values = {}
        for _ in range(2):
            came = get(where)
            values[came.text] = sticky_cookie(came)[0]
        assert set(values) == {b"live", b"dies"}
    came = get(where, request("/x", f"Cookie: passenger_target={values[b'dies']}"))
    assert (came.status, came.text) == (200, b"live")
    assert (
        labels(where, 3, request("/x", f"Cookie: passenger_target={sticky_cookie(came)[0]}")) == [b"live"] * 3
    )


def test_a_sticky_client_stays_across_workers_and_reloads(start, origins):
    ports = [free_port() for _ in range(2)]
    for port in ports:
        origins(port, str(port).encode())
    start.write(
        "program.py",
        f"""
import os
import gunicorn_passenger as passenger
from gunicorn_passenger import http_proxy

def response(upstream_response, request):
    upstream_response.headers["X-Worker"] = str(os.getpid())

application = http_proxy.create_server({ports}, sticky="cookie").listen("passenger")
application.on("proxy_res", response)
""",
    )
    process = start.gunicorn("program", workers=2).wait_ready()
    first = get(process.socket)
    sent = request("/x", f"Cookie: passenger_target={sticky_cookie(first)[0]}", "Connection: close")

    def all_workers_answer():
        workers = set()

        def ask_more():
            came = get(process.socket, sent)
            assert (came.status, came.text) == (200, first.text)
            workers.update(came.get("x-worker"))
            return len(workers) == 2

        wait_for(ask_more, "both workers to answer")

    all_workers_answer()
    process.hup(2)
    all_workers_answer()


def test_an_upgrade_of_a_sticky_client(lab):
    ports = [free_port() for _ in range(2)]
    where = lab.serve(f"{ports}, sticky='cookie'")
    with Upstream(ports[0]) as first, Upstream(ports[1]) as second:
        with connect(where) as client:
            client.send(request("/x", "Connection: close"))
            ready, _, _ = select.select([first.listener, second.listener], [], [], 30)
            mine, other = (first, second) if first.listener in ready else (second, first)
            wire = mine.accept()
            read_request(wire)
            wire.send(answer("200 OK", "Connection: close"))
            value, _ = sticky_cookie(read_response(client))
        for _ in range(3):
            upgrade = request("/ws", "Connection: Upgrade", "Upgrade: x", f"Cookie: passenger_target={value}")
            with connect(where) as client:
                wire = accept(mine, client.send(upgrade))
                got = Message(wire.head())
                assert got.get("cookie") == []
                wire.send(answer("403 No"))
                assert read_response(client).status == 403
                wire.close()
        assert not other.connects_within(0.1)


# --- functions -----------------------------------------------------------------------------------


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


def test_a_function_that_takes_its_time_holds_up_nobody(lab, origins, port):
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


# --- tables --------------------------------------------------------------------------------------


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
    """Two slashes at its begin are no authority."""
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


# --- https ---------------------------------------------------------------------------------------


class Certificates:
    """A private authority, and a certificate of it for localhost."""

    def __init__(self, home):
        self.authority = trustme.CA()
        self.file = str(home / "authority.pem")
        self.authority.cert_pem.write_to_path(self.file)

    def server(self, *names, client=False):
        """A server's TLS context."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.authority.issue_cert(*names).configure_cert(context)
        if client:
            context.verify_mode = ssl.CERT_REQUIRED
            self.authority.configure_trust(context)
        return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def secured(origins, port, certificates):
    """An https target whose authority nobody knows."""
    return origins(port, b"secret", tls=certificates.server("localhost", "127.0.0.1"))


@MODES
@pytest.mark.parametrize("scheme", ["https", "wss"])
def test_https_without_verification(lab, secured, port, mode, scheme):
    where = lab.serve(f"'{scheme}://localhost:{port}/base', secure=False", mode)
    assert labels(where, 2) == [b"secret"] * 2
    assert secured.paths == ["/base/x"] * 2
    assert {number for number, _ in secured.requests} == {1}


@MODES
@pytest.mark.parametrize("options", ["", ", secure=True"])
def test_https_is_verified(lab, secured, port, mode, options):
    where = lab.serve(f"'https://localhost:{port}'{options}", mode)
    assert refuse(where).status == 502
    log = lab.wait_log("(GET /x): 502").lower()
    assert "certificate" in log
    assert "traceback" not in log
    assert secured.requests == []


@MODES
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_https_with_a_private_authority(lab, secured, port, certificates, mode, host):
    lab.run(f"import ssl\ncontext = ssl.create_default_context(cafile={certificates.file!r})")
    agent = "agent=http_proxy.Agent(ssl_context=context)"
    where = lab.serve(f"'https://{host}:{port}', change_origin=True, {agent}", mode)
    assert get(where).text == b"secret"
    assert secured.requests[0][1].get("host") == [f"{host}:{port}"]


def test_https_with_the_certificate_of_another(lab, origins, port, certificates):
    origin = origins(port, tls=certificates.server("other.example"))
    lab.run(f"import ssl\ncontext = ssl.create_default_context(cafile={certificates.file!r})")
    where = lab.serve(f"'https://localhost:{port}', agent=http_proxy.Agent(ssl_context=context)")
    # the client's Host is not the name that is verified
    assert refuse(where, request("/x", "Host: other.example")).status == 502
    assert "certificate" in lab.wait_log("(GET /x): 502").lower()
    assert origin.requests == []


def test_https_with_a_clients_certificate(lab, origins, port, certificates, tmp_path):
    origins(port, b"known", tls=certificates.server("localhost", client=True))
    pem = str(tmp_path / "client.pem")
    certificates.authority.issue_cert("client.example").private_key_and_cert_chain_pem.write_to_path(pem)
    lab.run(f"import ssl\ncontext = ssl.create_default_context(cafile={certificates.file!r})")
    where = lab.serve(f"'https://localhost:{port}', agent=http_proxy.Agent(ssl_context=context)")
    assert refuse(where).status == 502
    lab.run("context.load_cert_chain(" + repr(pem) + ")")
    where = lab.serve(f"'https://localhost:{port}', agent=http_proxy.Agent(ssl_context=context)")
    assert get(where).text == b"known"


def test_the_name_that_tls_is_told(lab, origins, port, certificates):
    context = certificates.server("localhost")
    names = []
    context.sni_callback = lambda sock, name, context: names.append(name)
    origins(port, tls=context)
    assert get(lab.serve(f"'https://localhost:{port}', secure=False")).status == 200
    assert names == ["localhost"]


def test_https_carries_large_bodies(lab, port, certificates, origins):
    class Echo(Origin):
        def reply(self, message):
            return answer(body=message.text)

    body = b"0123456789abcdef" * 100_000
    with Echo(port, tls=certificates.server("localhost")):
        where = lab.serve(f"'https://localhost:{port}', secure=False")
        client = Client(where)
        try:
            client.request("POST", "/", body)
            assert client.getresponse().read() == body
        finally:
            client.close()


def test_https_to_a_target_that_speaks_http(lab, upstream, port):
    with connect(lab.serve(f"'https://localhost:{port}', secure=False")) as client:
        wire = accept(upstream, client.send(request()))
        wire.more()
        wire.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").close()
        assert read_response(client).status == 502
    assert "Traceback" not in lab.wait_log("(GET /x): 502")


def test_http_to_a_target_that_speaks_tls(lab, secured, port):
    assert refuse(lab.serve(f"{port}")).status == 502
    assert "Traceback" not in lab.wait_log("(GET /x): 502")


def test_an_upgrade_over_tls(lab, port, certificates):
    context = certificates.server("localhost")
    with Upstream(port) as upstream, connect(lab.serve(f"'wss://localhost:{port}', secure=False")) as client:
        client.send(request("/x", "Connection: Upgrade", "Upgrade: websocket"))
        wire = accept(upstream, client)
        wire.sock = context.wrap_socket(wire.sock, server_side=True)
        assert Message(wire.head()).get("upgrade") == ["websocket"]
        wire.send(b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert Message(client.head()).status == 101
        client.send(b"up")
        assert wire.exactly(2) == b"up"
        wire.send(b"down" * 50000)
        assert client.exactly(200_000) == b"down" * 50000
        wire.sock.close()
        assert client.ended()


# --- the address to connect from -----------------------------------------------------------------


@MODES
def test_local_address(lab, origins, port, mode):
    origin = origins(port)
    assert get(lab.serve(f"{port}, '127.0.0.1', local_address='127.0.0.9'", mode)).status == 200
    assert [peer[0] for peer in origin.peers] == ["127.0.0.9"]


def test_local_address_that_this_machine_has_not(lab, origins, port):
    origins(port)
    assert refuse(lab.serve(f"{port}, '127.0.0.1', local_address='192.0.2.1'")).status == 502
    assert "Traceback" not in lab.wait_log("(GET /x): 502")


def test_local_address_of_the_other_family_is_no_hindrance_to_a_name(lab, origins, port):
    """localhost may be ::1 first; only 127.0.0.1 can be reached from 127.0.0.9."""
    origin = origins(port)
    assert get(lab.serve(f"'http://localhost:{port}', local_address='127.0.0.9'")).status == 200
    assert [peer[0] for peer in origin.peers] == ["127.0.0.9"]


# --- connections ---------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize(
    "options", ["", ", agent=http_proxy.Agent()", ", agent=http_proxy.Agent(max_connections=1)"]
)
def test_connections_are_kept(lab, origins, port, mode, options):
    """Requests of different clients, one after another, on one connection."""
    if mode == "routed" and options:
        lab.run("agent = " + options.partition("=")[2])
        options = ", agent=agent"
    origin = origins(port)
    where = lab.serve(f"{port}{options}", mode)
    assert labels(where, 2) == [b"ok"] * 2
    assert get(where, request(method="POST", body=b"hello")).text == b"ok"
    assert [number for number, _ in origin.requests] == [1, 1, 1]
    for _, message in origin.requests:
        assert "close" not in [value.lower() for value in message.get("connection")]


@MODES
def test_without_an_agent_each_request_has_a_connection(lab, origins, port, mode):
    origin = origins(port)
    where = lab.serve(f"{port}, agent=False", mode)
    assert labels(where, 3) == [b"ok"] * 3
    assert [number for number, _ in origin.requests] == [1, 2, 3]
    for _, message in origin.requests:
        assert [value.lower() for value in message.get("connection")] == ["close"]


def test_without_an_agent_the_connection_is_closed(lab, upstream, port):
    where = lab.serve(f"{port}, agent=False")
    ask(where, upstream)
    assert upstream.wires[0].ended()


def test_an_agent_may_be_shared(lab, origins, port):
    origin = origins(port)
    lab.run("agent = http_proxy.Agent()")
    first, second = (lab.serve(f"{port}, agent=agent") for _ in range(2))
    assert labels(first, 1) + labels(second, 1) == [b"ok"] * 2
    assert len(origin.peers) == 1


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nConnection: x, Close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" + OK,
    ],
)
def test_connections_that_are_not_kept(lab, upstream, port, reply):
    """The target says so, is of another age, or has sent more than was asked for."""
    where = lab.serve(f"{port}")
    assert ask(where, upstream, request(), reply)[1].text == b"ok"
    assert upstream.wires[0].ended()
    got, came = ask(where, upstream, request("/second"), answer(body=b"second"))
    assert (got.path, came.text) == ("/second", b"second")


def test_a_kept_connection_that_the_target_closed(lab, upstream, port):
    where = lab.serve(f"{port}")
    for number in range(3):
        got, came = ask(where, upstream, request(f"/{number}"))
        assert (got.path, came.status) == (f"/{number}", 200)
        upstream.wires[-1].close()
    assert "proxy: " not in lab.log()


def test_an_unused_connection_is_closed_after_idle_timeout(lab, upstream, port):
    where = lab.serve(f"{port}, agent=http_proxy.Agent(idle_timeout=0.2)")
    ask(where, upstream)
    assert upstream.wires[0].ended()
    ask(where, upstream)


def test_a_connection_in_use_is_not_idle(lab, upstream, port):
    where = lab.serve(f"{port}, agent=http_proxy.Agent(idle_timeout=0.1)")
    with connect(where) as client:
        wire = accept(upstream, client.send(request()))
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        client.head()
        time.sleep(0.5)
        wire.send(b"half")
        assert client.exactly(8) == b"halfhalf"


@pytest.mark.parametrize("max_idle", [0, 1, 2])
def test_how_many_unused_connections_are_kept(lab, upstream, port, max_idle):
    where = lab.serve(f"{port}, agent=http_proxy.Agent(max_idle={max_idle}, idle_timeout=600)")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(where)) for _ in range(3)]
        for client in clients:
            read_request(accept(upstream, client.send(request())))
        for wire in upstream.wires:
            wire.send(OK)
        for client in clients:
            assert read_response(client).text == b"ok"
        open_ones = list(upstream.wires)
        while len(open_ones) > max_idle:
            ready, _, _ = select.select([wire.sock for wire in open_ones], [], [], 30)
            assert ready, f"{len(open_ones)} are kept"
            for wire in [wire for wire in open_ones if wire.sock in ready]:
                assert wire.ended()
                open_ones.remove(wire)
        assert len(open_ones) == max_idle
        assert not select.select([wire.sock for wire in open_ones], [], [], 0.1)[0]


@MODES
def test_max_connections_and_503(lab, upstream, port, mode):
    lab.run("agent = http_proxy.Agent(max_connections=1, connect_timeout=0.3)")
    where = lab.serve(f"{port}, '127.0.0.1', agent=agent", mode)
    lab.run("\nproxy.on('error', lambda e, request, target: seen.append((type(e).__name__, e.status_code)))")
    with connect(where) as first:
        wire = accept(upstream, first.send(request("/first")))
        read_request(wire)
        came = refuse(where, request("/second"))
        assert came.status == 503
        (after,) = came.get("retry-after")
        assert int(after) >= 0
        assert lab.seen() == [("PoolExhausted", 503)]
        wire.send(OK)
        assert read_response(first).status == 200
    assert "(GET /second): 503" in lab.wait_log("(GET /second): 503")
    # the place is free again
    assert not upstream.connects_within(0.05)
    with connect(where) as third:
        third.send(request("/third"))
        assert read_request(wire).path == "/third"
        wire.send(OK)
        assert read_response(third).status == 200


def test_max_connections_and_waiting(lab, upstream, port):
    where = lab.serve(f"{port}, agent=http_proxy.Agent(max_connections=2, connect_timeout=100)")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(where)) for _ in range(5)]
        for number, client in enumerate(clients):
            client.send(request(f"/{number}"))
        wires = [upstream.accept(), upstream.accept()]
        assert not upstream.connects_within(0.3)
        paths = []
        # whichever gets the next one
        while len(paths) < 5:
            ready, _, _ = select.select([w.sock for w in wires] + [upstream.listener], [], [], 30)
            assert ready
            if upstream.listener in ready:
                wires.append(upstream.accept())
                assert len(wires) <= 2, "a third connection"
            for wire in [w for w in wires if w.sock in ready]:
                paths.append(read_request(wire).path)
                wire.send(OK)
        assert sorted(paths) == [f"/{number}" for number in range(5)]
        for client in clients:
            assert read_response(client).text == b"ok"


def test_max_connections_counts_those_that_fail(lab, port):
    """A place is given back however the request ends."""
    where = lab.serve(
        f"{port}, proxy_timeout=0.2, agent=http_proxy.Agent(max_connections=1, connect_timeout=100)"
    )
    assert refuse(where).status == 502
    with Upstream(port) as upstream:
        for kind in ("late", "garbage", "closed", "gone", "half"):
            with connect(where) as client:
                wire = accept(upstream, client.send(request(f"/{kind}")))
                read_request(wire)
                if kind == "garbage":
                    wire.send(b"nonsense\r\n\r\n")
                elif kind == "half":
                    wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
                    client.head()
                    wire.close()
                elif kind == "closed":
                    wire.close()
                if kind != "gone":
                    client.rest() if kind == "half" else read_response(client)
            if kind == "gone":
                assert wire.ended()
        assert ask(where, upstream, request("/last"))[1].status == 200


def test_max_connections_are_counted_for_each_target(lab):
    ports = [free_port() for _ in range(2)]
    agent = "agent=http_proxy.Agent(max_connections=1, connect_timeout=100)"
    where = lab.serve(f"{{'/a/': {ports[0]}, '/b/': {ports[1]}}}, {agent}")
    with Upstream(ports[0]) as a, Upstream(ports[1]) as b, connect(where) as held:
        wire = accept(a, held.send(request("/a/")))
        read_request(wire)
        assert ask(where, b, request("/b/"))[1].status == 200
        wire.send(OK)
        assert read_response(held).status == 200


def test_an_upgrade_takes_a_place(lab, upstream, port):
    where = lab.serve(f"{port}, agent=http_proxy.Agent(max_connections=1, connect_timeout=0.3)")
    with connect(where) as client:
        wire = accept(upstream, client.send(request("/x", "Connection: Upgrade", "Upgrade: x")))
        wire.head()
        wire.send(b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
        client.head()
        assert refuse(where).status == 503
    assert wire.rest() == b""
    wire.close()

    def served():
        with connect(where) as client:
            client.send(request())
            ready, _, _ = select.select([upstream.listener, client.sock], [], [], 30)
            if upstream.listener not in ready:
                assert read_response(client).status == 503
                return False
            wire = upstream.accept()
            read_request(wire)
            wire.send(OK)
            return read_response(client).status == 200

    wait_for(served, "the place of the tunnel")


@pytest.fixture
def full():
    """Makes a listener's backlog full, so that who connects waits."""
    with contextlib.ExitStack() as stack:

        def fill(family, address):
            listener = stack.enter_context(socket.socket(family))
            listener.bind(address)
            listener.listen(0)
            for _ in range(4):
                sock = stack.enter_context(socket.socket(family))
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    sock.connect(address)

        yield fill


@MODES
def test_connect_timeout_is_504(lab, full, port, mode):
    full(socket.AF_INET, ("127.0.0.1", port))
    lab.run("agent = http_proxy.Agent(connect_timeout=0.3)")
    where = lab.serve(f"{port}, '127.0.0.1', agent=agent", mode)
    lab.run(
        "\nproxy.on('error', lambda e, request, target: seen.append((type(e).__name__, e.elapsed >= 0.2)))"
    )
    assert refuse(where).status == 504
    assert lab.seen() == [("UpstreamTimeout", True)]
    assert "Traceback" not in lab.wait_log("(GET /x): 504")


def test_connect_timeout_of_a_unix_socket(lab, full):
    path = lab.place()
    full(socket.AF_UNIX, path)
    where = lab.serve(f"'unix:{path}', agent=http_proxy.Agent(connect_timeout=0.3)")
    assert refuse(where).status in (503, 504)
    assert "Traceback" not in lab.wait_log("(GET /x): 50")


def test_tls_that_is_never_answered_is_a_connect_timeout(lab, upstream, port):
    where = lab.serve(
        f"'https://localhost:{port}', secure=False, agent=http_proxy.Agent(connect_timeout=0.3)"
    )
    assert refuse(where).status == 504


def test_connect_timeout_does_not_end_a_slow_answer(lab, upstream, port):
    where = lab.serve(f"{port}, agent=http_proxy.Agent(connect_timeout=0.3)")
    with connect(where) as client:
        wire = accept(upstream, client.send(request()))
        read_request(wire)
        time.sleep(0.6)
        wire.send(OK)
        assert read_response(client).status == 200


def test_many_requests_at_once(lab, origins, port):
    """More clients than connections: all are served, none gets another's answer."""

    class Own(Origin):
        def reply(self, message):
            return answer(body=message.path.encode())

    with Own(port) as origin:
        where = lab.serve(f"{port}, agent=http_proxy.Agent(max_connections=5, connect_timeout=100)")
        wrong = []

        def ask_some(number):
            client = Client(where)
            try:
                for turn in range(10):
                    client.request("GET", f"/{number}/{turn}")
                    if client.getresponse().read() != f"/{number}/{turn}".encode():
                        wrong.append((number, turn))
            except (OSError, http.client.HTTPException) as error:
                wrong.append(error)
            finally:
                client.close()

        threads = [threading.Thread(target=ask_some, args=[number]) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(origin.peers) <= 5
        assert len(origin.requests) == 200
