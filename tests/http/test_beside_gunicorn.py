"""The worker's HTTP/1.1 beside that of gunicorn's own gevent worker: the same bytes to both, the same to see.

Compared are the answers of a connection up to its end: status, fields, body; the environ and the body that the
program saw; and whether a further request on the connection was answered. gunicorn is sent each case in one
piece, ours also in parts, which must not change anything. ``HTTP_CASE=text`` chooses cases by name.

Where ours is meant to differ is said in :data:`DIFFERENCES`, and each of its tests looks at both.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from conditions import wait_for
from http_case_table import (
    CASES,
    PROBE,
    TWO_CHUNKS,
    Case,
    chunked,
    get,
    message,
    post,
    runs,
    selected,
    sized,
    unique,
)
from http_servers import Server, Servers, concurrently
from http_wire import EVERY_SPLIT, Answer, Connection, ask, calls, exchange, parse, read_head, splits, whole
from processes import KNOWN_NAMES

pytestmark = pytest.mark.skipif(
    "http_parser" not in KNOWN_NAMES, reason="the rules are those of the Python parser of gunicorn 27"
)


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    every = Servers()
    yield every
    every.end()


@pytest.fixture(scope="module")
def both(servers: Servers) -> list[Server]:
    """gunicorn's own worker and ours, with default settings."""
    return servers.get("default", "reference", "ours")


# --- the same ----------------------------------------------------------------------------------------


def plain_environ(environ: dict[str, Any], where: str | int, client: int) -> dict[str, Any]:
    """Without what must differ between two servers."""
    names = {
        "SERVER_PORT": (where, "its port"),
        "SERVER_NAME": (where, "its socket"),
        "REMOTE_PORT": (client, "client's"),
    }
    for key, (value, name) in names.items():
        if environ.get(key) == str(value):
            environ[key] = name
    return environ


def seen(answer: Answer, where: str | int, client: int, loose: bool) -> dict[str, Any]:
    """What is compared of an answer."""
    fields = [
        (name, "(date)" if name == "Date" and value != "then" else value) for name, value in answer.fields
    ]
    dropped = {"Connection"} if loose else set()
    body: Any = answer.body.decode("latin-1")
    if answer.get("Content-Type") == "application/json" and answer.whole and body:
        body = answer.json()
        body["environ"] = plain_environ(body["environ"], where, client)
        dropped.add("Content-Length")
    elif answer.status >= 400 and answer.get("Content-Type") == "text/html":
        body = "(error page)" if body else ""
        dropped.add("Content-Length")
    elif answer.get("Content-Type") == "application/json":
        dropped.add("Content-Length")
    return {
        "line": f"{answer.version} {answer.status} {answer.reason}",
        "fields": [list(pair) for pair in fields if pair[0] not in dropped],
        "body": body,
        "whole": answer.whole,
    }


def outcome(case: Case, where: str | int, parts: list[bytes]) -> dict[str, Any]:
    """All that is compared of a case."""
    try:
        raw, client = exchange(where, parts, case.eof)
    except AssertionError as error:
        return {"failed": str(error)}
    answers, rest = parse(raw, case.heads)
    if case.loose:
        # when the 100 comes, and whether, has a test of its own
        answers = [answer for answer in answers if answer.status != 100]
    return {
        "answers": [seen(answer, where, client, case.loose) for answer in answers],
        "rest": rest.decode("latin-1"),
    }


def differences(reference: Any, ours: Any, where: str = "") -> list[str]:
    """Where two outcomes differ, one line each."""
    if isinstance(reference, dict) and isinstance(ours, dict):
        keys = [*reference, *(key for key in ours if key not in reference)]
        pairs = [(key, reference.get(key, "(none)"), ours.get(key, "(none)")) for key in keys]
    elif isinstance(reference, list) and isinstance(ours, list) and len(reference) == len(ours):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(reference, ours, strict=True))]
    else:
        return [] if reference == ours else [f"{where}: gunicorn {_short(reference)}, ours {_short(ours)}"]
    return [line for key, a, b in pairs for line in differences(a, b, f"{where}.{key}" if where else key)]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 300 else f"{text[:200]} ... {text[-80:]}"


def compare(pair: list[Server], case: Case) -> str:
    """What differs, over the UNIX socket and over TCP, in one piece and in parts; the first that does."""
    reference, ours = pair
    for there, here in zip(reference.places, ours.places, strict=True):
        expected = outcome(case, there, [whole(case)])
        ways = [[whole(case)]]
        if isinstance(here, str):
            ways += splits(case, 5)
        elif case.name in EVERY_SPLIT:
            ways += splits(dataclasses.replace(case, name="a few"), 3)
        for parts in ways:
            if lines := differences(expected, outcome(case, here, parts)):
                sizes = [len(part) for part in parts][:20]
                way = f"over {'a UNIX socket' if isinstance(here, str) else 'TCP'}, in parts of {sizes}"
                return "\n    ".join([f"{case.name} {way}", *lines[:12]])
    return ""


@pytest.mark.parametrize("table", CASES)
def test_same_as_gunicorns_gevent_worker(servers, table):
    wanted = selected(CASES[table])
    if not wanted:
        pytest.skip("no case chosen")
    pair = servers.get(wanted[0].group, "reference", "ours")
    found = [text for text in concurrently(lambda case: compare(pair, case), wanted) if text]
    assert not found, f"{len(found)} of {len(wanted)} cases differ:\n" + "\n".join(found)


# --- meant to differ ---------------------------------------------------------------------------------


class Difference(NamedTuple):
    """What a test observes."""

    gunicorn: Any
    ours: Any
    #: why ours is right
    section: str


DIFFERENCES = {
    "body shorter than its length": Difference(
        gunicorn={"failed": False, "aborted": False},
        ours={"failed": True, "aborted": True},
        section="RFC 9112 6.3: an incomplete message; a program must not take it for a whole one",
    ),
    "empty file": Difference(
        gunicorn=b"0\r\n\r\n0\r\n\r\n",
        ours=b"0\r\n\r\n",
        section="RFC 9112 7.1: a body has one last chunk; a second is read as the next answer",
    ),
    "second head": Difference(
        gunicorn=["X-First", "Content-Length", "X-Second", "Content-Length"],
        ours=["X-Second", "Content-Length"],
        section="PEP 3333: with exc_info the new head replaces the one that was not sent; RFC 9112 6.3",
    ),
    "OSError before the head": Difference(
        gunicorn=[],
        ours=[500],
        section="RFC 9110 15.6: a server that fails says so",
    ),
    "length given twice": Difference(
        gunicorn="3, 3",
        ours="3",
        section="RFC 9110 8.6: a sender does not forward or make more than one",
    ),
    "malformed length": Difference(
        gunicorn=200,
        ours=500,
        section="RFC 9110 8.6: Content-Length = 1*DIGIT; RFC 9112 6.3: lengths that differ cannot be recovered from",
    ),
    "part that is not bytes": Difference(
        gunicorn=(200, False),
        ours=(500, True),
        section="RFC 9110 15.6: the failure is known before the head is sent",
    ),
    "sys.exit() before the head": Difference(
        gunicorn=["/probe"],
        ours=[500],
        section="RFC 9112 9.3.2: answers come in the order of the requests; without one the next is taken for it",
    ),
    "unwinding in mid-body": Difference(
        gunicorn="an error page",
        ours="cut",
        section="RFC 9112 7.1, 8: nothing but chunks may follow; the missing last chunk tells of the failure",
    ),
    "answer shorter than its length": Difference(
        gunicorn="stays open",
        ours="closed",
        section="RFC 9112 8: the close tells that the message is incomplete; else the next answer is its rest",
    ),
    "100 for a body that is not read": Difference(
        gunicorn=([100, 200], "keep-alive"),
        ours=([200], "close"),
        section="RFC 9110 10.1.1: a final status instead, and close, for the body may come all the same",
    ),
    "100 for a program that fails": Difference(
        gunicorn=([100, 500], "close"),
        ours=([500], "close"),
        section="RFC 9110 10.1.1",
    ),
    "close among other options": Difference(
        gunicorn="stays open",
        ours="closed",
        section="RFC 9110 7.6.1: Connection is a list; RFC 9112 9.6: close ends it",
    ),
    "target in absolute form": Difference(
        gunicorn=["a.test", "a.test", 200, 200, 200],
        ours=["b.test:81", "b.test", 400, 400, 400],
        section="RFC 9112 3.2.2: the host of the target counts; RFC 9110 4.2.1 to 4.2.4: what it must have",
    ),
    "length with zeros": Difference(
        gunicorn="0005",
        ours="5",
        section="RFC 9110 8.6: one number, for every recipient behind this server",
    ),
    "large body that is not read": Difference(
        gunicorn="stays open",
        ours="closed",
        section="RFC 9112 9.3: read the whole body or close",
    ),
}


def check(name: str, both: list[Server], observed: list[Any]) -> None:
    """Whether gunicorn does what was said of it, and ours what it must."""
    difference = DIFFERENCES[name]
    assert observed[0] == difference.gunicorn, f"gunicorn, {name}"
    assert observed[1] == difference.ours, f"ours, {name}: {difference.section}"


def noted(server: Server, target: str) -> Any:
    """What the application noted of its input."""
    return wait_for(lambda: calls(server.path)[1].get(target), f"a note on {target}")


def stays_open(where: str | int, data: bytes, heads: tuple[int, ...] = ()) -> str:
    """Whether a further request on the connection is answered."""
    raw, _ = exchange(where, [data + PROBE])
    return "stays open" if b'"RAW_URI": "/probe"' in raw else "closed"


@pytest.mark.parametrize("place", [0, 1], ids=["unix", "tcp"])
def test_body_shorter_than_its_length(both, place):
    observed = []
    for server in both:
        target = unique("short")
        exchange(
            server.places[place],
            [post("X-App: careful", "Content-Length: 10", body="abc", target=target)],
            eof=True,
        )
        note = noted(server, target)
        assert "abc".startswith(note.pop("got"))
        observed.append(note)
    check("body shorter than its length", both, observed)


@pytest.mark.parametrize(
    "body", ["", "3", "3\r\n", "3\r\nab", "3\r\nabc", "3\r\nabc\r\n", "0\r\n", "0\r\nX: 1\r\n"]
)
def test_chunked_body_that_breaks_off_fails_with_both(both, body):
    for server in both:
        target = unique("broken")
        data = post("X-App: careful", "Transfer-Encoding: chunked", body=body, target=target)
        exchange(server.path, [data], eof=True)
        note = noted(server, target)
        assert note["failed"]
        assert "abc".startswith(note["got"])


def test_empty_file(both):
    def body(where: str) -> bytes:
        return exchange(where, [runs("file empty", "Connection: close")])[0].partition(b"\r\n\r\n")[2]

    check("empty file", both, [body(server.path) for server in both])


def test_second_head_replaces_the_first(both):
    def names(where: str) -> list[str]:
        (answer,) = ask(where, runs("start again", "Connection: close"))
        assert answer.status == 503
        return [name for name, _ in answer.fields if name.startswith(("X-", "Content"))]

    check("second head", both, [names(server.path) for server in both])


@pytest.mark.parametrize("application", ["oserror", "oserror started"])
def test_oserror_before_the_head(both, application):
    def statuses(where: str) -> list[int]:
        return [answer.status for answer in ask(where, runs(application) + PROBE)]

    check("OSError before the head", both, [statuses(server.path) for server in both])


def test_exit_before_the_head(both):
    def answered(where: str) -> list[Any]:
        answers = ask(where, runs("exit") + PROBE)
        return [a.json()["environ"]["RAW_URI"] if a.status == 200 else a.status for a in answers]

    check("sys.exit() before the head", both, [answered(server.path) for server in both])


def test_length_given_twice(both):
    def length(where: str) -> str | None:
        return ask(where, runs("length twice", "Connection: close"))[0].get("Content-Length")

    check("length given twice", both, [length(server.path) for server in both])


@pytest.mark.parametrize("application", ["length -1", "lengths differ"])
def test_a_length_that_is_not_valid(both, application):
    def status(where: str) -> int:
        return parse(exchange(where, [runs(application, "Connection: close")])[0])[0][0].status

    check("malformed length", both, [status(server.path) for server in both])


@pytest.mark.parametrize("application", ["part str", "part bytearray", "string", "write str"])
def test_a_part_that_is_not_bytes(both, application):
    def answer(where: str) -> tuple[int, bool]:
        (answer,) = parse(exchange(where, [runs(application) + PROBE])[0])[0]
        return answer.status, answer.whole

    check("part that is not bytes", both, [answer(server.path) for server in both])


def test_unwinding_in_mid_body(both):
    def ends(where: str) -> str:
        raw, _ = exchange(where, [runs("unwind later") + PROBE])
        body = raw.partition(b"\r\n\r\n")[2]
        if body == b"3\r\none\r\n":
            return "cut"
        return "an error page" if body.startswith(b"3\r\none\r\nHTTP/1.1 500 ") else repr(body)

    check("unwinding in mid-body", both, [ends(server.path) for server in both])


def test_unwinding_before_the_head_is_a_500_with_both(both):
    for server in both:
        (answer,) = ask(server.path, runs("unwind") + PROBE)
        assert (answer.status, answer.get("Connection")) == (500, "close")


@pytest.mark.parametrize(
    "application", ["too little", "nothing of 5", "file too little", "memory too little"]
)
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_answer_shorter_than_its_length(both, application, version):
    request = runs(application, "Connection: keep-alive", version=version)
    check("answer shorter than its length", both, [stays_open(server.path, request) for server in both])


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_after_head_of_a_short_response_both_continue(both, version):
    """The answer to HEAD has a length and no body."""
    request = runs("too little", "Connection: keep-alive", method="HEAD", version=version)
    assert [stays_open(server.path, request) for server in both] == ["stays open"] * 2


def _expecting(application: str, *fields: str) -> bytes:
    fields = fields or ("Content-Length: 5",)
    return post("Expect: 100-continue", f"X-App: {application}", *fields)


def _expect_nothing(where: str | int, data: bytes, own_end: bool) -> tuple[list[int], str | None]:
    """The answers to a head whose body never comes, and what Connection the last one says."""
    with Connection(where) as connection:
        connection.send(data)
        connection.wait_for(rb"HTTP/1.1 [2-5]\d\d .*?\r\n\r\n.*?(}$|</html>\n$)")
        if not own_end:
            connection.half_close()
        answers, rest = parse(connection.wait_end())
    assert not rest
    return [answer.status for answer in answers], answers[-1].get("Connection")


@pytest.mark.parametrize(
    "fields", [("Content-Length: 5",), ("Transfer-Encoding: chunked",)], ids=["length", "chunked"]
)
def test_no_100_for_a_body_that_is_not_read(both, fields):
    data = _expecting("ignore", *fields)
    check(
        "100 for a body that is not read",
        both,
        [
            _expect_nothing(both[0].path, data, own_end=False),
            _expect_nothing(both[1].path, data, own_end=True),
        ],
    )


def test_no_100_for_a_program_that_fails(both):
    data = _expecting("raise")
    check("100 for a program that fails", both, [_expect_nothing(server.path, data, True) for server in both])


@pytest.mark.parametrize("place", [0, 1], ids=["unix", "tcp"])
@pytest.mark.parametrize("application", ["echo", "readline", "iterate", "part", "read 1"])
def test_100_for_a_program_that_reads_with_both(both, place, application):
    """The body follows when the 100 has come; the connection stays open."""
    for server in both:
        with Connection(server.places[place]) as connection:
            connection.send(_expecting(application))
            connection.wait_for(rb"^HTTP/1.1 100 Continue\r\n\r\n")
            assert connection.received == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.send(b"hello" + PROBE)
            answers, rest = parse(connection.wait_end())
        assert [answer.status for answer in answers] == [100, 200, 200]
        assert "".join(answers[1].json()["got"]) in ("hello", "hel")
        assert answers[2].json()["environ"]["RAW_URI"] == "/probe"
        assert not rest


def test_no_100_after_the_head_of_the_answer(both):
    """A program that answers first and reads then: a 100 in the midst of the answer would be its body."""
    for server, statuses in zip(both, ([100, 200], [200]), strict=True):
        with Connection(server.path) as connection:
            connection.send(_expecting("write first"))
            connection.wait_for(b"first\n")
            connection.send(b"hello")
            connection.half_close()
            answers, rest = parse(connection.wait_end())
        assert [answer.status for answer in answers] == statuses
        assert answers[-1].body == b"first\nhello"
        assert not rest


@pytest.mark.parametrize(
    ("version", "values"),
    [
        *(("1.1", values) for values in (
            ("x, close",), ("close, x",), ("keep-alive, close",), ("keep-alive ,\tClose",), ("keep-alive", "close"),
            ("x,", "y,,CLOSE,"), ("x", "y", "close"), (",close",),
        )),
        ("1.0", ("keep-alive", "close")),
    ],
)  # fmt: skip
def test_close_among_other_options(both, values, version):
    data = message(f"GET /c HTTP/{version}", "Host: a.test", *(f"Connection: {value}" for value in values))
    check("close among other options", both, [stays_open(server.path, data) for server in both])


def _large(kind: str, size: int) -> bytes:
    body = b"x" * size
    if kind == "length":
        return sized(body, "X-App: ignore")
    if kind == "part of length":
        return sized(body, "X-App: part")
    chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
    return chunked(chunk * (size // 1024) + b"0\r\n\r\n", "X-App: ignore")


KINDS = ["length", "part of length", "chunked"]


@pytest.mark.parametrize("place", [0, 1], ids=["unix", "tcp"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_large_body_that_is_not_read(both, kind, place):
    data = _large(kind, 600_000)
    check("large body that is not read", both, [stays_open(server.places[place], data) for server in both])


@pytest.mark.parametrize("size", [1024, 8192, 60 * 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_after_a_small_body_that_is_not_read_both_continue(both, kind, size):
    assert [stays_open(server.path, _large(kind, size)) for server in both] == ["stays open"] * 2


def test_what_is_unread_is_never_a_request(both):
    """A body that looks like requests, of which the program reads some or nothing."""
    for server in both:
        inner = unique("inner")
        for size in (1, 2000):
            for application in ("ignore", "part", "part line"):
                data = sized(get(inner) * size, f"X-App: {application}")
                exchange(server.path, [data + PROBE])
                exchange(server.path, [data], eof=True)
        assert inner not in calls(server.path)[0]


def test_every_answers_close_is_called_once(both):
    """Also when the program fails, or the client leaves."""
    for server in both:
        for application in (
            "chunks",
            "raise later",
            "raise first part",
            "too much",
            "204 with body",
            "unwind later",
        ):
            target = unique("closing")
            data = message(
                f"GET {target} HTTP/1.1", "Host: a.test", f"X-App: {application}", "Connection: close"
            )
            exchange(server.path, [data])
            wait_for(lambda server=server, target=target: calls(server.path)[0].get(f"close {target}"))
            assert calls(server.path)[0][f"close {target}"] == 1, application


def test_early_hints_come_before_the_answer_is_made(both):
    for server in both:
        answers = ask(server.path, runs("hints", "Connection: close"))
        assert [answer.status for answer in answers] == [103, 103, 103, 200]
        assert read_head(exchange(server.path, [runs("hints", "Connection: close")])[0])
        assert [len(answer.fields) for answer in answers[:3]] == [2, 1, 0]


def test_two_chunks_arrive_as_they_are_made(both):
    """Each part of an answer is a chunk of its own; none is empty but the last."""
    for server in both:
        (answer,) = ask(server.path, runs("chunks", "Connection: close"))
        assert answer.chunks == [4, 4, 5, 0]
        assert re.fullmatch(b"one\ntwo\nthree", answer.body)


def test_trailers_are_not_fields(both):
    for server in both:
        answer, probe = ask(server.path, chunked(TWO_CHUNKS[:-2] + "X-Trailer: 1\r\n\r\n") + PROBE)
        assert "X-TRAILER" not in json.dumps(answer.json()).upper().replace("-", "_").replace("_", "-")
        assert probe.status == 200


def test_target_in_absolute_form(both):
    def answered(where: str) -> list[Any]:
        found: list[Any] = []
        for target in "http://b.test:81/x", "HTTP://b.test/x":
            (response,) = ask(where, message(f"GET {target} HTTP/1.1", "Host: a.test", "Connection: close"))
            found.append(response.json()["environ"]["HTTP_HOST"])
        for target in "http:///x", "http://user@b.test/x", "ftp://b.test/x":
            (response,) = ask(where, message(f"GET {target} HTTP/1.1", "Host: a.test", "Connection: close"))
            found.append(response.status)
        return found

    check("target in absolute form", both, [answered(server.path) for server in both])


def test_length_with_zeros(both):
    def length(where: str) -> Any:
        (response,) = ask(where, post("Content-Length: 0005", "Connection: close", body="hello"))
        return response.json()["environ"]["CONTENT_LENGTH"]

    check("length with zeros", both, [length(server.path) for server in both])
