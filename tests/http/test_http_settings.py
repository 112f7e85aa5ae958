"""gunicorn's settings of HTTP mean under our worker what they mean under gunicorn's, on every server."""

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
import time
from collections import Counter

import pytest
from conftest import KNOWN_NAMES, Client, descriptors, fetch, free_port, wait_for
from gunicorn import config, version_info

#: Seconds that a client of the tests waits for any one thing.
LIMIT = 30

#: gunicorn answers 400 to a request line that is too long, until it learned of 414.
TOO_LONG = {414} if version_info >= (24,) else {400, 414}


def needs(name):
    return pytest.mark.skipif(name not in KNOWN_NAMES, reason=f"this gunicorn has no setting {name}")


class Answer:
    """One answer, read to its end."""

    def __init__(self, sock, method="GET"):
        response = http.client.HTTPResponse(sock, method=method)
        try:
            response.begin()
            self.status = response.status
            self.reason = response.reason
            self.headers = response.headers
            self.body = response.read()
        finally:
            response.close()

    def json(self):
        return json.loads(self.body)


def dial(address):
    client = Client(address, timeout=LIMIT)
    client.connect()
    return client.sock


def request(target="/show", *lines, method="GET", version="HTTP/1.1", body=b"", close=True):
    """The bytes of a request; ``lines`` stand behind the Host."""
    head = [f"{method} {target} {version}", "Host: localhost", *lines]
    if body:
        head.append(f"Content-Length: {len(body)}")
    if close:
        head.append("Connection: close")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def ask(address, data, method="GET"):
    """Send bytes on a connection of their own."""
    with contextlib.closing(dial(address)) as sock:
        # the server may have refused it and closed before all of it is sent
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        return Answer(sock, method)


def ended(sock):
    """Whether the server has ended the connection, by whatever means; waits for it."""
    with contextlib.suppress(ConnectionError):
        return sock.recv(100) == b""
    return True


class Served:
    """The program of these tests, running on its primary and on a second server."""

    def __init__(self, start, *arguments, workers=1, bind="", ready=True, env=None):
        self.second = free_port()
        self.process = start.gunicorn(
            "http_settings_app:application", *arguments, workers=workers, bind=bind,
            env={"P1": self.second, **(env or {})},
        )  # fmt: skip
        self.primary = int(bind.rpartition(":")[2]) if bind else self.process.socket
        if ready:
            self.process.wait_ready(self.primary)
        else:
            self.process.wait_log("Booting worker")

    @property
    def both(self):
        return (self.primary, self.second)

    def show(self, address, *lines, **options):
        answer = ask(address, request("/show", *lines, **options))
        assert answer.status == 200, answer.body
        return answer.json()


@pytest.fixture
def serve(start):
    return lambda *arguments, **options: Served(start, *arguments, **options)


# --- limits --------------------------------------------------------------------------------------


def test_limit_request_line(serve):
    served = serve("--limit-request-line", 200)
    rest = len("GET / HTTP/1.1")
    for address in served.both:
        assert ask(address, request("/" + "x" * (200 - rest))).status == 200
        assert ask(address, request("/" + "x" * (201 - rest))).status in TOO_LONG
        # it is not waited for the end of a line that is too long already
        assert ask(address, b"GET /" + b"x" * 5000).status in TOO_LONG
        assert fetch(address)[0] == 200


def test_limit_request_line_by_default(serve):
    served = serve()
    for address in served.both:
        assert ask(address, request("/" + "x" * 4000)).status == 200
        assert ask(address, request("/" + "x" * 5000)).status in TOO_LONG


def test_no_limit_of_the_request_line(serve):
    served = serve("--limit-request-line", 0)
    for address in served.both:
        assert served.show(address, method="GET")["PATH_INFO"] == "/show"
        assert len(ask(address, request("/" + "x" * 20000)).json()["PATH_INFO"]) == 20001


def test_limit_request_fields(serve):
    served = serve("--limit-request-fields", 10)
    for address in served.both:
        # Host and Connection are two of them
        lines = [f"X-Field-{number}: x" for number in range(9)]
        assert served.show(address, *lines[:8])["HTTP_X_FIELD_7"] == "x"
        assert ask(address, request("/show", *lines)).status == 431


def test_limit_request_field_size(serve):
    served = serve("--limit-request-field_size", 100)
    # the line with its end
    rest = len("X-Field: \r\n")
    for address in served.both:
        assert served.show(address, "X-Field: " + "x" * (100 - rest))["HTTP_X_FIELD"] == "x" * (100 - rest)
        assert ask(address, request("/show", "X-Field: " + "x" * (101 - rest))).status == 431


def test_an_endless_head_is_refused(serve):
    served = serve("--limit-request-fields", 10, "--limit-request-field_size", 100)
    for address in served.both:
        assert ask(address, request("/show")[:-2] + b"X-Field: x\r\n" * 5000).status == 431
        assert fetch(address)[0] == 200


# --- trusted peers -------------------------------------------------------------------------------

FORWARDED = ("X-Forwarded-Proto: https", "Script_Name: /mounted")


def is_trusted(shown):
    """Whether the peer's word was taken for scheme and mount point; both or neither."""
    result = shown["wsgi.url_scheme"] == "https"
    assert result == (shown["SCRIPT_NAME"] == "/mounted")
    assert shown["PATH_INFO"] == ("/show" if result else "/mounted/show")
    return result


def show_mounted(address):
    return ask(address, request("/mounted/show", *FORWARDED)).json()


@pytest.mark.parametrize(
    ("allowed", "trusted"),
    [
        ("127.0.0.1,::1", True),
        ("*", True),
        ("192.0.2.1", False),
        ("192.0.2.1,127.0.0.1", True),
        ("", False),
        pytest.param(
            "127.0.0.0/8",
            True,
            marks=pytest.mark.skipif(
                not hasattr(config.Config, "forwarded_allow_networks"),
                reason="this gunicorn takes no networks here",
            ),
        ),
    ],
)
def test_forwarded_allow_ips(serve, allowed, trusted):
    served = serve(f"--forwarded-allow-ips={allowed}")
    assert is_trusted(show_mounted(served.second)) is trusted
    # who connects to a UNIX socket is trusted always
    assert is_trusted(show_mounted(served.primary)) is True


@pytest.mark.parametrize("trusted", [True, False])
def test_forwarded_allow_ips_on_a_primary_with_a_tcp_bind(serve, trusted):
    allowed = "127.0.0.1" if trusted else "192.0.2.1"
    served = serve("--forwarded-allow-ips", allowed, bind=f"127.0.0.1:{free_port()}")
    assert is_trusted(show_mounted(served.primary)) is trusted
    assert is_trusted(show_mounted(served.second)) is trusted


def test_secure_scheme_headers(serve, start):
    conf = start.write("conf.py", "secure_scheme_headers = {'X-SECURE': 'yes', 'X-TLS': 'on'}")
    served = serve("-c", conf)

    def scheme(address, *lines):
        return served.show(address, *lines)["wsgi.url_scheme"]

    for address in served.both:
        assert scheme(address) == "http"
        assert scheme(address, "X-Secure: yes") == "https"
        assert scheme(address, "x-secure: no") == "http"
        assert scheme(address, "X-TLS: on") == "https"
        assert scheme(address, "X-Secure: yes", "X-TLS: on") == "https"
        # no longer one of them
        assert scheme(address, "X-Forwarded-Proto: https") == "http"
        assert ask(address, request("/show", "X-Secure: yes", "X-TLS: off")).status == 400


def test_forwarder_headers(serve):
    served = serve("--forwarder-headers", "X_ALLOWED,SCRIPT_NAME", "--header-map", "drop")
    for address in served.both:
        shown = served.show(address, "X_Allowed: 1", "X_Other: 2", "Path_Info: /3")
        assert shown["HTTP_X_ALLOWED"] == "1"
        assert "HTTP_X_OTHER" not in shown
        assert "HTTP_PATH_INFO" not in shown
        assert shown["PATH_INFO"] == "/show"


def test_forwarder_headers_of_an_untrusted_peer(serve):
    served = serve("--forwarder-headers", "X_ALLOWED", "--forwarded-allow-ips", "192.0.2.1")
    assert "HTTP_X_ALLOWED" not in served.show(served.second, "X_Allowed: 1")
    assert served.show(served.primary, "X_Allowed: 1")["HTTP_X_ALLOWED"] == "1"


@pytest.mark.parametrize("policy", ["drop", "refuse", "dangerous", "default"])
def test_header_map(serve, policy):
    served = serve(*([] if policy == "default" else ["--header-map", policy]))
    for address in served.both:
        answer = ask(address, request("/show", "X_Field: under", "X-Field: dash"))
        if policy == "refuse":
            assert answer.status == 400
        else:
            expected = "under,dash" if policy == "dangerous" else "dash"
            assert answer.json()["HTTP_X_FIELD"] == expected
        # what the forwarder may say it may say always
        assert (
            ask(address, request("/mounted/show", "Script_Name: /mounted")).json()["SCRIPT_NAME"]
            == "/mounted"
        )


# --- leniency ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lenient", [False, True])
def test_strip_header_spaces(serve, lenient):
    served = serve(*["--strip-header-spaces"] * lenient)
    for address in served.both:
        answer = ask(address, request("/show", "X-Field : value"))
        assert answer.status == (200 if lenient else 400)
        if lenient:
            assert answer.json()["HTTP_X_FIELD"] == "value"


@pytest.mark.parametrize("lenient", [False, True])
def test_permit_obsolete_folding(serve, lenient):
    served = serve(*["--permit-obsolete-folding"] * lenient)
    for address in served.both:
        answer = ask(address, request("/show", "X-Field: one", "  two", "\tthree"))
        assert answer.status == (200 if lenient else 400)
        if lenient:
            assert answer.json()["HTTP_X_FIELD"] == "one two three"


@pytest.mark.parametrize("lenient", [False, True])
def test_permit_unconventional_http_method(serve, lenient):
    served = serve(*["--permit-unconventional-http-method"] * lenient)
    for address in served.both:
        for method in ("get", "MIXed", "GO", "A#B", "X" * 21):
            answer = ask(address, request("/show", method=method))
            assert answer.status == (200 if lenient else 400), method
            if lenient:
                assert answer.json()["REQUEST_METHOD"] == method
        assert served.show(address, method="PROPFIND")["REQUEST_METHOD"] == "PROPFIND"
        # no token is a method in no case
        assert ask(address, request("/show", method="A(B")).status == 400


@pytest.mark.parametrize("lenient", [False, True])
def test_permit_unconventional_http_version(serve, lenient):
    served = serve(*["--permit-unconventional-http-version"] * lenient)
    for address in served.both:
        for version in ("HTTP/2.0", "HTTP/3.1"):
            sock = dial(address)
            with contextlib.closing(sock):
                sock.sendall(request("/pid", version=version))
                line = sock.makefile("rb").readline().split()
            assert line[1] == (b"200" if lenient else b"400"), line
        assert served.show(address, version="HTTP/1.2")["SERVER_PROTOCOL"] == "HTTP/1.2"
        assert ask(address, request("/show", version="HTTP/1.23")).status == 400
        assert ask(address, request("/show", version="HTTPS/1.1")).status == 400


def test_casefold_http_method(serve):
    served = serve("--permit-unconventional-http-method", "--casefold-http-method")
    for address in served.both:
        assert served.show(address, method="geT")["REQUEST_METHOD"] == "GET"
        # folded before it is asked whether the answer has a body
        answer = ask(address, request("/pid", method="head"), "HEAD")
        assert (answer.status, answer.body) == (200, b"")


# --- keepalive -----------------------------------------------------------------------------------


def test_no_keepalive(serve):
    served = serve("--keep-alive", 0)
    for address in served.both:
        with contextlib.closing(dial(address)) as sock:
            sock.sendall(request("/pid", close=False))
            answer = Answer(sock)
            assert (answer.status, answer.headers["Connection"]) == (200, "close")
            assert ended(sock)


def test_keepalive_time(serve):
    served = serve("--keep-alive", 1)
    for address in served.both:
        with contextlib.closing(dial(address)) as sock:
            for _ in range(3):
                asked = time.monotonic()
                sock.sendall(request("/pid", close=False))
                answer = Answer(sock)
                assert (answer.status, answer.headers["Connection"]) == (200, "keep-alive")
            assert ended(sock)
            assert time.monotonic() - asked > 0.9


def test_a_busy_connection_is_not_idle(serve, home):
    """The time runs between requests: an answer may take longer."""
    served = serve("--keep-alive", 1)
    for number, address in enumerate(served.both):
        with contextlib.closing(dial(address)) as sock:
            sock.sendall(request(f"/hold?{home}/go-{number}", close=False))
            served.process.wait_log(f"enters {home}/go-{number}")
            # until an idle connection would have been closed
            with contextlib.closing(dial(address)) as idle:
                idle.sendall(request("/pid", close=False))
                assert Answer(idle).status == 200
                assert ended(idle)
            (home / f"go-{number}").touch()
            assert Answer(sock).status == 200
            sock.sendall(request("/pid"))
            assert Answer(sock).status == 200


@pytest.mark.parametrize(
    ("version", "field", "kept"),
    [
        ("HTTP/1.1", "", True),
        ("HTTP/1.1", "Connection: close", False),
        ("HTTP/1.1", "Connection: Keep-Alive", True),
        ("HTTP/1.0", "", False),
        ("HTTP/1.0", "Connection: keep-alive", True),
    ],
)
def test_the_client_decides_whether_to_keep(serve, version, field, kept):
    served = serve("--keep-alive", 30)
    for address in served.both:
        with contextlib.closing(dial(address)) as sock:
            for _ in range(2 if kept else 1):
                sock.sendall(request("/pid", *filter(None, [field]), version=version, close=False))
                answer = Answer(sock)
                assert (answer.status, answer.headers["Connection"]) == (
                    200,
                    "keep-alive" if kept else "close",
                )
            if not kept:
                assert ended(sock)


# --- how many ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["primary", "second"])
def test_worker_connections(serve, home, where):
    """With two, a third client waits until one of the two has left."""
    served = serve("--worker-connections", 2)
    address = served.primary if where == "primary" else served.second
    with contextlib.ExitStack() as stack:
        socks = []
        for name in ("one", "two", "three", "four"):
            sock = stack.enter_context(contextlib.closing(dial(address)))
            sock.sendall(request(f"/hold?{home}/{name}"))
            socks.append(sock)
            if name in ("one", "two"):
                served.process.wait_log(f"enters {home}/{name}, inside")
        (home / "three").touch()
        (home / "four").touch()
        (home / "one").touch()
        for index in (0, 2, 3):
            assert Answer(socks[index]).status == 200
        (home / "two").touch()
        assert Answer(socks[1]).status == 200
    order = re.findall(rf"(enters|leaves) {home}/(\w+)", served.process.log())
    assert order[:3] == [("enters", "one"), ("enters", "two"), ("leaves", "one")]
    assert order[-1] == ("leaves", "two")
    assert set(re.findall(r"inside (\d+)", served.process.log())) == {"1", "2"}


def test_max_requests_on_one_connection(serve):
    """The last answer of a worker says that it closes; a further request goes to the next worker."""
    served = serve("--max-requests", 5, ready=False)
    with contextlib.closing(dial(served.primary)) as sock:
        said = []
        for _ in range(5):
            sock.sendall(request("/pid", close=False))
            answer = Answer(sock)
            assert answer.status == 200
            said.append(answer.headers["Connection"])
        assert said == ["keep-alive"] * 4 + ["close"]
        assert ended(sock)
    served.process.wait_log("Autorestarting worker after current request")
    wait_for(lambda: fetch(served.primary)[1] != answer.body.decode(), "the next worker")


@pytest.mark.parametrize("jitter", [0, 3])
def test_max_requests_loses_none(serve, jitter):
    served = serve("--max-requests", 5, "--max-requests-jitter", jitter, ready=False)
    pids = []
    while len(set(pids)) < 4:
        for address in served.both:
            status, body = fetch(address)
            assert status == 200
            pids.append(int(body))
    counts = Counter(pids)
    del counts[pids[-1]]
    assert min(counts.values()) >= 5, counts
    served.process.wait_log("Autorestarting worker after current request", 3)
    assert served.process.log().count("Autorestarting worker") >= 3
    for word in ("Traceback", "[ERROR]", "[CRITICAL]"):
        assert word not in served.process.log()


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sendfile", [True, False])
def test_files(serve, start, sendfile):
    content = os.urandom(1_000_003)
    (start.home / "file").write_bytes(content)
    (start.home / "file.empty").write_bytes(b"")
    size = len(content)
    served = serve(*["--no-sendfile"] * (not sendfile), env={"FILE": start.home / "file"})
    cases = {
        f"0,{size},file": content,
        "0,,file": content,  # no Content-Length: chunked
        f"1000,{size - 1000},file": content[1000:],
        "1000,,file": content[1000:],
        "5,100,file": content[5:105],
        "0,70000,file": content[:70000],
        "0,0,file": b"",
        f"{size},,file": b"",
        "0,0,empty": b"",
        "0,,empty": b"",
        f"0,{size},memory": content,
        "7,,memory": content[7:],
        "7,50,memory": content[7:57],
        f"0,{size},reader": content,
        "7,,reader": content[7:],
        "7,50,reader": content[7:57],
    }
    for address in served.both:
        # one after the other on one connection: each ends where the next begins
        with contextlib.closing(dial(address)) as sock:
            for query, expected in cases.items():
                sock.sendall(request(f"/file?{query}", close=False))
                answer = Answer(sock)
                assert answer.status == 200, query
                assert answer.body == expected, query
                assert ("Content-Length" in answer.headers) == bool(query.split(",")[1]), query
                # nothing of the file goes to who asks for the head only
                sock.sendall(request(f"/file?{query}", method="HEAD", close=False))
                assert Answer(sock, "HEAD").status == 200, query
        for version in ("HTTP/1.0", "HTTP/1.1"):
            assert ask(address, request("/file?9,,file", version=version)).body == content[9:]
    (worker,) = served.process.workers()
    wait_for(
        lambda: not any(name.startswith(f"{start.home}/file") for name in descriptors(worker)),
        "the files to be closed",
    )
    assert "Traceback" not in served.process.log()


def test_a_client_that_leaves_within_a_file(serve, start):
    """The file is closed, and the worker serves on without an error."""
    with (start.home / "file").open("wb") as file:
        file.truncate(50_000_000)
    served = serve(env={"FILE": start.home / "file"})
    (worker,) = served.process.workers()
    for address in served.both:
        with contextlib.closing(dial(address)) as sock:
            sock.sendall(request("/file?0,50000000,file"))
            assert sock.recv(10)
        wait_for(lambda: f"{start.home}/file" not in descriptors(worker), "the file to be closed")
        assert fetch(address)[0] == 200
    assert "Traceback" not in served.process.log()


# --- the access log ------------------------------------------------------------------------------

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
    login = base64.b64encode(b"somebody:secret").decode()
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
        if line["m"] == "HEAD":  # an older gunicorn sends a body to who asked for none
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
    """Eight clients as fast as they can: nobody is starved by the others, with the log on or off."""
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

        # each file goes on where the one before it ended: nothing is lost
        wait_for(lambda: lines()[-1:] == [asked], "the last line")  # noqa: B023
        assert lines() == list(range(lines()[0], asked + 1))
        assert first < asked
        before.unlink()


# --- loggers -------------------------------------------------------------------------------------


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
    """What clients do every day is no error, at the most talkative level."""
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


# --- wsgi.errors ---------------------------------------------------------------------------------


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


# --- hooks ---------------------------------------------------------------------------------------

CONF = "python:http_settings_conf"


def hooked(process, name, count):
    """What a hook has said so far, when it has been called so often."""
    process.wait_log(rf"{name} \{{", count)
    return [json.loads(text) for text in re.findall(rf"{name} (\{{.*\}})", process.log())]


def test_request_hooks(serve):
    served = serve("-c", CONF, "--keep-alive", 5, ready=False)
    requests = [
        (request("/pid?x=%20y#z", "X-Asked: it", close=False), "GET"),
        (request("/read", method="POST", body=b"twelve bytes"), "POST"),
        (request("/unmeasured"), "GET"),
        (request("/missing", version="HTTP/1.0"), "GET"),
    ]
    for number, address in enumerate(served.both):
        for data, method in requests:
            ask(address, data, method)
        before = hooked(served.process, "pre_request", 4 * number + 4)[-4:]
        after = hooked(served.process, "post_request", 4 * number + 4)[-4:]
        (worker,) = served.process.workers()
        assert {entry.pop("pid") for entry in (*before, *after)} == {worker}
        assert before[0].pop("remote") in ([], "", ["127.0.0.1"])
        assert before[0] == {
            "method": "GET",
            "uri": "/pid?x=%20y#z",
            "path": "/pid",
            "query": "x=%20y",
            "fragment": "z",
            "version": [1, 1],
            "headers": [["HOST", "localhost"], ["X-ASKED", "it"]],
            "scheme": "http",
            "body": True,
            "should_close": False,
        }
        assert [entry["method"] for entry in before] == ["GET", "POST", "GET", "GET"]
        assert [entry["should_close"] for entry in before] == [False, True, True, True]
        assert before[3]["version"] == [1, 0]
        assert after[0] == {
            "uri": "/pid?x=%20y#z",
            "path": "/pid",
            "status": "200 OK",
            "status_code": 200,
            "headers": [["Content-Type", "text/plain"], ["Content-Length", "10"], ["X-Answer", "some value"]],
            "headers_sent": True,
            "sent": 10,
            "response_length": 10,
            "chunked": False,
            "should_close": False,
        }
        assert [entry["status_code"] for entry in after] == [200, 200, 200, 404]
        assert [entry["sent"] for entry in after] == [10, 2, 7, 7]
        assert [entry["response_length"] for entry in after] == [10, 2, None, 7]
        assert [entry["chunked"] for entry in after] == [False, False, True, False]
        assert [entry["should_close"] for entry in after] == [False, True, True, True]
    assert "Traceback" not in served.process.log()


def test_hooks_of_a_request_that_fails(serve):
    served = serve("-c", CONF, ready=False)
    for number, address in enumerate(served.both, 1):
        assert ask(address, request("/broken")).status == 500
        entry = hooked(served.process, "post_request", number)[-1]
        assert (entry["uri"], entry["path"], entry["status"]) == ("/broken", "/broken", None)
        # the application never saw it: no hook is called
        assert ask(address, b"nonsense\r\n\r\n").status == 400
    served.process.wait_log("broken before the answer", 2)
    assert len(hooked(served.process, "pre_request", 2)) == 2


def test_a_pre_request_hook_that_raises(serve):
    served = serve("-c", CONF, ready=False, env={"RAISE": "pre_request"})
    for number, address in enumerate(served.both, 1):
        for _ in range(2):
            assert ask(address, request("/pid")).status == 500
        assert "status" not in hooked(served.process, "post_request", 2 * number)[-1]
        served.process.wait_log("ValueError: raised in pre_request", 2 * number)


def test_a_post_request_hook_that_raises(serve):
    """The answer is sent already, and the connection goes on."""
    served = serve("-c", CONF, ready=False, env={"RAISE": "post_request"})
    for number, address in enumerate(served.both, 1):
        with contextlib.closing(dial(address)) as sock:
            for _ in range(3):
                sock.sendall(request("/pid", close=False))
                answer = Answer(sock)
                assert (answer.status, answer.headers["Connection"]) == (200, "keep-alive")
        served.process.wait_log("Exception in post_request hook", 3 * number)
        served.process.wait_log("ValueError: raised in post_request", 3 * number)


# --- the environment -----------------------------------------------------------------------------


def test_script_name_of_the_environment(serve):
    served = serve(ready=False, env={"SCRIPT_NAME": "/mounted"})
    for address in served.both:
        shown = ask(address, request("/mounted/show/more")).json()
        assert (shown["SCRIPT_NAME"], shown["PATH_INFO"]) == ("/mounted", "/show/more")
        shown = ask(address, request("/mounted/other/show", "Script_Name: /mounted/other")).json()
        assert (shown["SCRIPT_NAME"], shown["PATH_INFO"]) == ("/mounted/other", "/show")
        assert ask(address, request("/elsewhere")).status == 500


@needs("root_path")
def test_root_path_is_not_wsgis(serve):
    served = serve("--root-path", "/mounted")
    for address in served.both:
        assert served.show(address)["SCRIPT_NAME"] == ""
