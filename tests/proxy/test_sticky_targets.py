"""The option sticky: a client stays with its target."""

import base64
import contextlib
import re
import select

import pytest
from conditions import wait_for
from free_ports import free_port
from proxy_laboratory import (
    MODES,
    Message,
    Origin,
    accept,
    answer,
    ask,
    get,
    labels,
    read_request,
    read_response,
    request,
)
from upstream_sockets import Upstream, connect

# --- sticky ------------------------------------------------------------------------------------------


def sticky_cookie(message, name="passenger_target"):
    """The cookie that the proxy set: its value and its attributes."""
    (text,) = [value for value in message.get("set-cookie") if value.startswith(name + "=")]
    first, *attributes = [part.strip() for part in text.split(";")]
    return first.partition("=")[2], {a.lower() for a in attributes}


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
    # balanced as without a cookie, and each response sets a new one
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


# --- 9, 10, 18, 22: several targets ------------------------------------------------------------------


@pytest.mark.parametrize(
    "cookie", ['prefs={"a": 1}; %s', '%s; prefs={"a": 1}', "a b; %s", 'x="; %s', "p=[1,2]; =; %s"]
)
def test_a_client_stays_with_its_target_whatever_other_cookies_it_has(lab, origins, cookie):
    a, b = free_port(), free_port()
    origins(a, b"a"), origins(b, b"b")
    where = lab.serve(f"[{a}, {b}], sticky='cookie'")
    first = get(where)
    (made,) = first.get("set-cookie")
    own = made.partition(";")[0]
    for _ in range(6):
        message = get(where, request("/x", f"Cookie: {cookie % own}"))
        assert message.text == first.text
        assert not message.get("set-cookie")
