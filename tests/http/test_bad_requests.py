"""Bad input over HTTP/1.1: refused with gunicorn's status, closed, and nothing after it is a request.

Where gunicorn has the Python parser whose rules these are, its own gevent worker is held to the same table.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from http_case_table import BAD, Case, chunked, get, message, post, selected, unique
from http_servers import Server, Servers, concurrently
from http_wire import ask, awkward, calls, cut, exchange, parse
from processes import KNOWN_NAMES

#: gunicorn's setting http_parser: left alone, or set to the one whose rules are kept; and gunicorn's own worker.
WORKERS = ["ours", *(["ours python", "reference"] if "http_parser" in KNOWN_NAMES else [])]

#: An older gunicorn has older rules for heads, and calls a bad chunk its own error; it is refused all the same.
OLDER = "http_parser" not in KNOWN_NAMES


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    every = Servers()
    yield every
    every.end()


def refusal(case: Case, where: str | int, parts: list[bytes], before: int = 0) -> str:
    """What is wrong with the refusal of a case; empty when it is as it should be."""
    try:
        raw, _ = exchange(where, parts)
    except AssertionError as error:
        return str(error)
    answers, rest = parse(raw)
    statuses = [answer.status for answer in answers]
    if statuses not in ([200] * before + [status] for status in (case.status, *([500] if OLDER else []))):
        return f"answers {statuses}, not {case.status}"
    last = answers[-1]
    if last.get("Connection") != "close" or not last.whole or rest:
        return f"not a whole answer: {raw[-400:]!r}"
    return ""


def attempts(case: Case, server: Server) -> list[str]:
    """Send a case in several ways; what went wrong."""
    found = []
    never = unique("after")
    first, following = get("/first"), get(never)
    ways: list[tuple[str, str | int, list[bytes], int]] = [
        ("alone", server.path, [case.data], 0),
        ("alone, TCP", server.port, [case.data], 0),
        ("a request after it", server.path, [case.data + following], 0),
        ("a request after it, TCP", server.port, [case.data + following], 0),
    ]
    if case.group != "limits":
        ways.append(("a request before it", server.path, [first + case.data + following], 1))
        ways.append(("a request before it, in parts", server.path, [first, case.data, following], 1))
    places = awkward(case.data)
    ways.append(("in parts", server.path, cut(case.data, *places[:: max(1, len(places) // 4)]), 0))
    for name, where, parts, before in ways:
        if wrong := refusal(case, where, parts, before):
            # one of them says enough, and a connection that stays open takes time
            found.append(f"{case.name}, {name}: {wrong}")
            break
    if never in calls(server.path)[0]:
        found.append(f"{case.name}: what came after it was a request")
    return found


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("group", ["default", "limits", "casefold"])
def test_refused(servers, group, worker):
    table = selected(case for case in BAD if case.group == group and (not OLDER or "bad chunk" in case.name))
    if not table:
        pytest.skip("no case chosen, or none that an older gunicorn refuses")
    (server,) = servers.get(group, worker)
    found = [text for texts in concurrently(lambda case: attempts(case, server), table) for text in texts]
    assert not found, f"{len(found)} attempts:\n" + "\n".join(found)


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("application", ["ignore", "part"])
def test_bad_chunks_that_are_not_read(servers, worker, application):
    """The answer is on its way before they are found; then nothing more is a request."""
    (server,) = servers.get("default", worker)
    for body in (
        "x\r\n",
        "3\r\nabc\r\nx\r\n",
        "3\r\nabcd\r\n0\r\n\r\n",
        "3\r\nabc\r\n0\r\nbad\r\n\r\n",
        "3\r\nabc\r\n-1\r\n\r\n",
    ):
        if application == "part" and body == "x\r\n":
            continue
        target = unique("after")
        raw, _ = exchange(server.path, [chunked(body, f"X-App: {application}") + get(target)], eof=True)
        statuses = [answer.status for answer in parse(raw)[0]]
        # gunicorn reads on and answers 400 to a request that it has answered
        assert statuses in ([200], [200, 400], [400]), body
        assert target not in calls(server.path)[0]


@pytest.mark.parametrize("worker", WORKERS)
def test_a_program_that_continues_after_a_bad_chunk(servers, worker):
    """The program catches the error and answers: the connection ends all the same."""
    (server,) = servers.get("default", worker)
    for body in (
        "x\r\n\r\n",
        "3\r\nabc\r\n3_0\r\n",
        "3\r\nabcd\r\n0\r\n\r\n",
        "3\r\nabc\r\n0\r\nbad\r\n\r\n",
    ):
        inner, target = unique("careful"), unique("after")
        data = post("Transfer-Encoding: chunked", "X-App: careful", body=body, target=inner)
        (answer,) = ask(server.path, data + get(target))
        assert answer.status == 200
        assert answer.json()["failed"]
        assert target not in calls(server.path)[0]


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize(
    "size",
    ["7fffffff", "ffffffff", "7fffffffffffffff", "ffffffffffffffff", "f" * 17, "f" * 200, "1" + "0" * 16],
)
def test_chunk_size_that_no_body_has(servers, worker, size):
    """Refused, or waited for: never cut to a smaller number, and never the end of the body."""
    (server,) = servers.get("default", worker)
    inner, target = unique("huge"), unique("after")
    data = post(
        "Transfer-Encoding: chunked", "X-App: careful", body=f"{size}\r\nabc\r\n0\r\n\r\n", target=inner
    )
    exchange(server.path, [data + get(target)], eof=True)
    called, notes = calls(server.path)
    assert target not in called
    assert inner not in notes or notes[inner]["failed"]


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize(
    "length",
    ["2147483648", "4294967296", "4294967299", "9223372036854775808", "18446744073709551619", "9" * 200],
)
def test_length_that_no_body_has(servers, worker, length):
    """Refused, or waited for: never cut to a smaller number."""
    (server,) = servers.get("default", worker)
    inner, target = unique("huge"), unique("after")
    data = post(f"Content-Length: {length}", "X-App: careful", body="abc", target=inner)
    exchange(server.path, [data + get(target)], eof=True)
    called, notes = calls(server.path)
    assert target not in called
    if worker != "reference":
        assert inner not in notes or notes[inner]["failed"]


@pytest.mark.parametrize("worker", WORKERS)
def test_what_is_refused_says_what_was_wrong_and_no_more(servers, worker):
    """The page of a refusal is text for people, and what the client sent is escaped in it."""
    (server,) = servers.get("default", worker)
    (answer,) = ask(server.path, message("GET /<script> HTTP/9.9", "X: <b>"))
    assert answer.status == 400
    assert answer.get("Content-Type") == "text/html"
    assert b"<script>" not in answer.body
    (answer,) = ask(server.path, message("<script> / HTTP/1.1"))
    assert b"<script>" not in answer.body


@pytest.mark.parametrize("worker", WORKERS[:2])
def test_limits_hold_for_what_came_in_one_piece(servers, worker):
    """The head is over its limit when it has come, not when the next piece comes."""
    (server,) = servers.get("limits", worker)
    (answer,) = ask(server.path, b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"v" * 300)
    assert (answer.status, answer.get("Connection")) == (431, "close")
