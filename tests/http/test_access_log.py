"""gunicorn's access log, loggers and wsgi.errors, as our HTTP core writes them."""

import base64
import contextlib
import http.client
import itertools
import json
import os
import re
import selectors
import signal
import socket
from collections import Counter

import pytest
from conditions import wait_for
from free_ports import free_port
from gunicorn import version_info
from http_client import fetch
from http_settings_site import LIMIT, Answer, ask, dial, ended, request
from processes import KNOWN_NAMES, descriptors

# --- the access log ----------------------------------------------------------------------------------


#: those that only have a form, and their form
FORMS = {
    "t": r"\[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\]",
    "T": r"\d+",
    "D": r"\d+",
    "M": r"\d+",
    "L": r"\d+\.\d{6}",
    "p": r"<\d+>",
}
#: what a line about a request that was not answered by the application is compared by
ALWAYS = ("h", "l", "r", "m", "H", "s")

ATOMS = (
    *("h", "l", "u", "t", "r", "m", "U", "q", "H", "s", "b", "B", "f", "a", "T", "D", "M", "L", "p"),
    *(
        "{x-asked}i",
        "{X-Asked}i",
        "{host}i",
        "{content-length}i",
        "{transfer-encoding}i",
        "{cookie}i",
        "{none}i",
    ),
    *("{x-answer}o", "{x-twice}o", "{content-length}o", "{content-type}o", "{etag}o"),
    *("{connection}o", "{transfer-encoding}o", "{server}o", "{date}o", "{none}o"),
    *("{server_protocol}e", "{raw_uri}e", "{request_method}e", "{wsgi.url_scheme}e", "{script_name}e"),
    *("{path_info}e", "{remote_addr}e", "{http_x_asked}e", "{content_length}e", "{none}e"),
)


def answered():
    """Requests that the application answers: what to send, and the method."""
    login = base64.b64encode(b"ada:secret").decode()
    yield request("/pid"), "GET"
    yield request("/pid", method="HEAD"), "HEAD"
    yield request("/missing?q=1&r=%20"), "GET"
    yield request("/read", method="POST", body=b"x" * 5000), "POST"
    yield request("/read", "Transfer-Encoding: chunked", method="PUT") + b"3\r\nabc\r\n0\r\n\r\n", "PUT"
    yield request("/nothing", method="DELETE"), "DELETE"
    yield request("/unchanged"), "GET"
    yield request("/unmeasured"), "GET"
    yield request("/unmeasured", method="HEAD"), "HEAD"
    yield request("/unmeasured", version="HTTP/1.0"), "GET"
    yield request("/longer"), "GET"
    yield request("/written"), "GET"
    yield request("/unfinished-body", method="POST", body=b"never read"), "POST"
    yield request("/pid", f"Authorization: Basic {login}"), "GET"
    yield request("/pid", "Authorization: Basic !!!"), "GET"
    yield request("/pid", "Authorization: Bearer token"), "GET"
    yield (
        request("/pid", "Referer: http://a/b?c", 'User-Agent: an "agent" \\ %(h)s', "X-Asked: a value"),
        "GET",
    )
    yield request("/pid", "X-Asked: one", "X-Asked: two", "Cookie: a=b; c=d"), "GET"
    yield request("/pid", "X-Asked: \xe9\xff"), "GET"
    yield request("/pid", "X-Forwarded-Proto: https", "X-Forwarded-For: 192.0.2.7"), "GET"
    yield request("/p%C3%A9/%2F?%C3%A9#part"), "GET"
    yield request("/pid;a=1?"), "GET"
    yield request("//double//slash"), "GET"
    yield request("http://elsewhere/pid?absolute"), "GET"
    yield request("*", method="OPTIONS"), "OPTIONS"


def unanswered():
    """Requests that fail, or are refused."""
    yield request("/broken?x"), "GET"
    yield request("/broken-later"), "GET"
    yield b"nonsense\r\n\r\n", "GET"
    yield b"GET /two words HTTP/1.1\r\n\r\n", "GET"
    yield request("/" + "x" * 9000), "GET"
    yield request("/pid", "X-Field: " + "x" * 9000), "GET"
    yield request("/pid", *[f"X-Field-{number}: x" for number in range(101)]), "GET"
    yield request("/pid", "no colon"), "GET"
    yield request("/pid", "X-Spaced : x"), "GET"
    yield request("/pid", version="HTTP/2.0"), "GET"
    yield request("/pid", method="get"), "GET"
    yield request("/pid", "Content-Length: 1", "Content-Length: 2"), "GET"
    yield request("/pid", "Content-Length: nought"), "GET"
    yield request("/pid", "Content-Length: 3", "Transfer-Encoding: chunked"), "GET"
    yield request("/pid", "Transfer-Encoding: unheard-of"), "GET"
    yield request("/pid", "X-Forwarded-Proto: https", "X-Forwarded-SSL: off"), "GET"
    if version_info >= (24,):
        yield request("/read", "Transfer-Encoding: chunked", method="POST") + b"zz\r\n", "POST"


def access_lines(served_by, log, addresses, requests):
    """What the access log says of the requests, each as a dictionary; timings by their form only."""
    for address in addresses:
        for data, method in requests:
            with contextlib.suppress(http.client.HTTPException, ConnectionError):
                ask(address, data, method)
    ask(addresses[0], request("/pid?that-is-all"))
    wait_for(lambda: "/pid?that-is-all" in log.read_text(errors="replace"), lambda: served_by.log()[-3000:])
    lines = []
    for line in log.read_text(errors="replace").splitlines():
        values = dict(zip(ATOMS, line.split("|"), strict=True))
        if values["q"] == "that-is-all":
            continue
        for atom, form in FORMS.items():
            assert re.fullmatch(form, values[atom]), (atom, values[atom])
            values[atom] = "as it should be"
        lines.append(values)
    return lines


@pytest.mark.parametrize("kind", ["answered", "unanswered"])
def test_access_log_format(start, kind):
    """Every atom is what it is under gunicorn's own gevent worker."""
    requests = list({"answered": answered, "unanswered": unanswered}[kind]())
    # of what its Python parser refuses, gunicorn logs what had a head; its other parser knows no head then
    python_parser = ["--http-parser", "python"] if "http_parser" in KNOWN_NAMES else []
    logs = {}
    for worker in ("gevent", "gunicorn_passenger.Worker"):
        log = start.home / f"access-{worker}"
        port = free_port()
        own = worker != "gevent"
        process = start.gunicorn(
            "http_settings_app", "-k", worker, "--access-logfile", log,
            "--access-logformat", "|".join(f"%({atom})s" for atom in ATOMS),
            *([] if own else ["-b", f"127.0.0.1:{port}", *python_parser]),
            workers=1, env={"P1": port} if own else {},
        )  # fmt: skip
        process.wait_log("Booting worker")
        logs[worker] = access_lines(process, log, [process.socket, port], requests)
        assert process.stop() == 0
    expected, seen = logs.values()
    for line in expected:
        if line["m"] == "HEAD":  # an older gunicorn sends a body in response to HEAD
            line["b"] = line["B"] = "0"
    if kind == "unanswered":
        expected, seen = (
            [{atom: line[atom] for atom in ALWAYS} for line in lines] for lines in (expected, seen)
        )
    else:
        assert len(expected) == 2 * len(requests)
    for number, (own, theirs) in enumerate(itertools.zip_longest(seen, expected, fillvalue={})):
        # the atoms that differ
        differing = {atom for atom in {**own, **theirs} if own.get(atom) != theirs.get(atom)}
        ours = {atom: own.get(atom) for atom in differing}
        gunicorns = {atom: theirs.get(atom) for atom in differing}
        assert ours == gunicorns, f"line {number}: {theirs.get('r')}"


def test_access_log_by_default(serve, start):
    log = start.home / "access"
    served = serve("--access-logfile", log)
    for address in served.both:
        ask(address, request("/missing?q", "Referer: r", "User-Agent: a"))
        wait_for(lambda: '"GET /missing?q' in log.read_text(), "the line")
        line = log.read_text().splitlines()[-1]
        host = "" if address == served.primary else "127.0.0.1"
        form = rf'{host} - - \[[^]]+\] "GET /missing\?q HTTP/1\.1" 404 7 "r" "a"'
        assert re.fullmatch(form, line), line
        log.write_text("")


def test_access_log_is_even(serve, start):
    """Eight clients as fast as they can: none of them starves another, with the log on or off."""
    log = start.home / "access"
    served = serve("--access-logfile", log)
    total = 4000
    for address in served.both:
        with contextlib.ExitStack() as stack:
            selector = stack.enter_context(selectors.DefaultSelector())
            counts = []
            for number in range(8):
                sock = stack.enter_context(contextlib.closing(dial(address)))
                selector.register(sock, selectors.EVENT_READ, number)
                counts.append(0)
            ask_again = request("/pid", close=False)
            for key in list(selector.get_map().values()):
                key.fileobj.sendall(ask_again)
            received = [b""] * 8
            while sum(counts) < total:
                for key, _ in selector.select(LIMIT):
                    data = key.fileobj.recv(65536)
                    assert data, "a connection was closed"
                    received[key.data] += data
                    head, end, body = received[key.data].partition(b"\r\n\r\n")
                    if end and len(body) >= 10:
                        assert head.startswith(b"HTTP/1.1 200 ")
                        received[key.data] = b""
                        counts[key.data] += 1
                        key.fileobj.sendall(ask_again)
        assert min(counts) >= total / 8 / 5, counts


def test_sigusr1_reopens_the_access_log(serve, start):
    log = start.home / "access"
    served = serve("--access-logfile", log)
    for address in served.both:
        asked = 0

        def ask_more():
            nonlocal asked
            asked += 1
            fetch(address, f"/pid?{asked}")  # noqa: B023
            return len(log.read_text().splitlines()) >= 3 if log.exists() else False

        log.unlink()
        before = start.home / "access.1"
        served.process.signal(signal.SIGUSR1)
        wait_for(log.exists, "the new file")
        wait_for(ask_more, "lines in the new file")
        log.rename(before)
        first = asked
        served.process.signal(signal.SIGUSR1)
        wait_for(ask_more, "lines in the next file")

        def lines():
            text = before.read_text() + log.read_text()  # noqa: B023
            return [int(number) for number in re.findall(r"/pid\?(\d+) ", text)]

        # each file begins where the one before it ended: nothing is lost
        wait_for(lambda: lines()[-1:] == [asked], "the last line")  # noqa: B023
        assert lines() == list(range(lines()[0], asked + 1))
        assert first < asked
        before.unlink()


# --- loggers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("logged", [True, False])
def test_own_logger_class(serve, start, logged):
    """Its ``access()`` is asked whether there is an access log or not."""
    log = start.home / "access"
    served = serve(
        "--logger-class", "http_settings_logging.OwnLogger", "--access-logformat", "%(own)s %(U)s",
        *["--access-logfile", log] * logged,
    )  # fmt: skip
    for count, address in enumerate(served.both, 1):
        ask(address, request("/pid?x=1", "X-Asked: it", method="PUT"))
        ask(address, request("/missing"))
        served.process.wait_log(r'account .*"uri": "/missing"', count)
        account = json.loads(served.process.wait_log(r'account (.*"uri": "/pid\?x=1".*)', count)[1])
        assert account == {
            "status": "200 OK",
            "code": 200,
            "sent": 10,
            "length": 10,
            "answer": "some value",
            "method": "PUT",
            "uri": "/pid?x=1",
            "path": "/pid",
            "query": "x=1",
            "version": [1, 1],
            "asked": "it",
            "peer": "" if address == served.primary else "127.0.0.1",
        }
    if logged:
        wait_for(lambda: log.read_text().count("own-PUT-200 /pid\n") == 2, log.read_text)
        assert log.read_text().count("own-GET-404 /missing\n") == 2
    assert "Traceback" not in served.process.log()


def test_logconfig_dict(serve, start):
    """A formatter that makes its own line of the record's atoms."""
    conf = start.write(
        "conf.py",
        f"""
        logconfig_dict = {{
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {{"json": {{"()": "http_settings_logging.JsonFormatter"}}}},
            "handlers": {{
                "json": {{"class": "logging.FileHandler", "filename": "{start.home}/json", "formatter": "json"}}
            }},
            "root": {{"level": "INFO", "handlers": []}},
            "loggers": {{
                "gunicorn.access": {{"level": "INFO", "handlers": ["json"], "propagate": False}},
            }},
        }}
        """,
    )
    served = serve("-c", conf, ready=False)
    log = start.home / "json"
    for address in served.both:
        ask(address, request("/pid?x=1", "X-Asked: it"))
        wait_for(lambda: log.exists() and log.read_text().endswith("\n"), "the line")
        entry = json.loads(log.read_text())
        assert isinstance(entry.pop("D"), int)
        assert entry == {
            "logger": "gunicorn.access",
            "h": "" if address == served.primary else "127.0.0.1",
            "m": "GET",
            "U": "/pid",
            "q": "x=1",
            "s": "200",
            "B": 10,
            "{x-asked}i": "it",
            "{x-answer}o": "some value",
            "{request_method}e": "GET",
            "{none}i": "-",
        }
        os.truncate(log, 0)


def test_statsd(serve):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as statsd:
        statsd.bind(("127.0.0.1", 0))
        statsd.settimeout(LIMIT)
        port = statsd.getsockname()[1]
        served = serve("--statsd-host", f"127.0.0.1:{port}", "--statsd-prefix", "own", ready=False)
        for address in served.both:
            for _ in range(3):
                assert fetch(address)[0] == 200
            assert fetch(address, "/missing")[0] == 404
        seen = Counter()
        while (
            seen["own.gunicorn.requests:1|c|@1.0"] < 8
            or not seen["own.gunicorn.request.status.404:1|c|@1.0"] >= 2
        ):
            datagram = statsd.recv(1000).decode()
            if match := re.fullmatch(r"own\.gunicorn\.request\.duration:([\d.]+)\|ms", datagram):
                assert float(match[1]) >= 0
                datagram = "duration"
            seen[datagram] += 1
        assert seen["own.gunicorn.request.status.200:1|c|@1.0"] == 6
        assert seen["own.gunicorn.request.status.404:1|c|@1.0"] == 2
        assert seen["own.gunicorn.requests:1|c|@1.0"] == 8
        assert seen["duration"] == 8


def test_debug_log_shows_no_traceback(serve):
    """What clients do every day is not an error, at the most talkative level."""
    served = serve("--log-level", "debug", "--keep-alive", 1)
    for address in served.both:
        fetch(address)
        with contextlib.closing(dial(address)):
            pass  # connects and leaves
        with contextlib.closing(dial(address)) as sock:
            sock.sendall(request("/pid", close=False)[:-10])  # leaves within a head
        with contextlib.closing(dial(address)) as sock:
            sock.sendall(request("/unfinished-body", method="POST", body=b"x" * 100)[:-50])
            assert Answer(sock).status == 200
        with contextlib.closing(dial(address)) as sock:
            sock.sendall(request("/pid", close=False))
            assert Answer(sock).status == 200
            assert ended(sock)
        for data, method in answered():
            ask(address, data, method)
        assert ask(address, b"nonsense\r\n\r\n").status == 400
        # a body that another request would be read from
        assert ask(address, request("/read", method="POST", body=b"GET / HTTP/1.1\r\n\r\n")).body == b"18"
    # gunicorn's own pre_request hook
    served.process.wait_log(r"\[DEBUG\] GET /missing", 2)
    assert served.process.stop() == 0
    for word in ("Traceback", "[ERROR]", "[CRITICAL]", "Exception"):
        assert word not in served.process.log()


# --- wsgi.errors -------------------------------------------------------------------------------------


def expected_errors(word):
    return f"written {word} žluť\nlines {word}\nmore {word}\nprinted {word}\n"


def test_wsgi_errors_on_the_error_log(serve):
    served = serve(env={"PYTHONIOENCODING": "utf-8"})
    for number, address in enumerate(served.both):
        assert fetch(address, f"/errors?word{number}")[0] == 200
        served.process.wait_log(f"printed word{number}")
        assert expected_errors(f"word{number}") in served.process.log()
    assert "Traceback" not in served.process.log()


def test_wsgi_errors_go_to_the_error_log_that_usr1_opened(serve, start):
    log = start.home / "errors"
    process = start.gunicorn(
        "http_settings_app", "--error-logfile", log, workers=1,
        env={"P1": (port := free_port()), "PYTHONUTF8": "1"},
    )  # fmt: skip
    process.wait_ready()
    for number, address in enumerate((process.socket, port)):
        assert fetch(address, f"/errors?before{number}")[0] == 200
        wait_for(lambda: f"printed before{number}" in log.read_text(), "the text")  # noqa: B023
        assert expected_errors(f"before{number}") in log.read_text()
        old = start.home / f"errors.{number}"
        log.rename(old)
        process.signal(signal.SIGUSR1)
        wait_for(log.exists, "the new file")

        def in_the_new_file():
            # the worker hears of the signal after the master
            assert fetch(address, f"/errors?after{number}")[0] == 200  # noqa: B023
            return expected_errors(f"after{number}") in log.read_text()  # noqa: B023

        wait_for(in_the_new_file, log.read_text)
        assert not any(str(old) == name for pid in process.workers() for name in descriptors(pid))
    assert "Traceback" not in log.read_text() + process.log()
