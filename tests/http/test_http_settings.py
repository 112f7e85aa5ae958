"""gunicorn's settings of HTTP mean under our worker what they mean under gunicorn's, on every server."""

import contextlib
import json
import os
import re
import time
from collections import Counter

import pytest
from conditions import wait_for
from free_ports import free_port
from gunicorn import config, version_info
from http_client import fetch
from http_settings_site import Answer, ask, dial, ended, request
from processes import KNOWN_NAMES, descriptors

#: gunicorn answers 400 to a request line that is too long, until it learned of 414.
TOO_LONG = {414} if version_info >= (24,) else {400, 414}


def needs(name):
    return pytest.mark.skipif(name not in KNOWN_NAMES, reason=f"this gunicorn has no setting {name}")


# --- limits ------------------------------------------------------------------------------------------


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


# --- trusted peers -----------------------------------------------------------------------------------


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
    # clients of a UNIX socket are always trusted
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


# --- leniency ----------------------------------------------------------------------------------------


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


# --- keepalive ---------------------------------------------------------------------------------------


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


# --- how many ----------------------------------------------------------------------------------------


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
    """The connection moves to the next worker, or closes after a response that says so."""
    served = serve("--max-requests", 5, ready=False)
    with contextlib.closing(dial(served.primary)) as sock:
        said, pids = [], []
        while len(set(pids)) < 2 and "close" not in said:
            sock.sendall(request("/pid", close=False))
            answer = Answer(sock)
            assert answer.status == 200
            said.append(answer.headers["Connection"])
            pids.append(answer.body.decode())
        assert pids.count(pids[0]) >= 5
        assert "close" not in said or ended(sock)
    served.process.wait_log("Autorestarting worker after current request")
    wait_for(lambda: fetch(served.primary)[1] != pids[0], "the next worker")


@pytest.mark.parametrize("jitter", [0, 3])
def test_max_requests_loses_no_request(serve, jitter):
    served = serve("--max-requests", 5, "--max-requests-jitter", jitter, ready=False)
    pids = []
    while len(set(pids)) < 4:
        for address in served.both:
            status, body = fetch(address)
            assert status == 200
            pids.append(int(body))
    counts = Counter(pids)
    # two workers may start at the same time, for two that have had their requests
    assert min(counts[pid] for pid in list(counts)[:2]) >= 5, counts
    served.process.wait_log("Autorestarting worker after current request", 3)
    assert served.process.log().count("Autorestarting worker") >= 3
    for word in ("Traceback", "[ERROR]", "[CRITICAL]"):
        assert word not in served.process.log()


# --- files -------------------------------------------------------------------------------------------


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
                # a client that sends HEAD gets nothing of the file
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


# --- hooks -------------------------------------------------------------------------------------------


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
    """The response is sent already, and the connection stays open."""
    served = serve("-c", CONF, ready=False, env={"RAISE": "post_request"})
    for number, address in enumerate(served.both, 1):
        with contextlib.closing(dial(address)) as sock:
            for _ in range(3):
                sock.sendall(request("/pid", close=False))
                answer = Answer(sock)
                assert (answer.status, answer.headers["Connection"]) == (200, "keep-alive")
        served.process.wait_log("Exception in post_request hook", 3 * number)
        served.process.wait_log("ValueError: raised in post_request", 3 * number)


# --- the environment ---------------------------------------------------------------------------------


def test_script_name_of_the_environment(serve, home):
    access = home / "access.log"
    served = serve("--access-logfile", access, ready=False, env={"SCRIPT_NAME": "/mounted"})
    for address in served.both:
        shown = ask(address, request("/mounted/show/more")).json()
        assert (shown["SCRIPT_NAME"], shown["PATH_INFO"]) == ("/mounted", "/show/more")
        shown = ask(address, request("/mounted/other/show", "Script_Name: /mounted/other")).json()
        assert (shown["SCRIPT_NAME"], shown["PATH_INFO"]) == ("/mounted/other", "/show")
        assert ask(address, request("/elsewhere")).status == 500
    # FAULTS N16: with a line in the access log, as gunicorn has it
    wait_for(lambda: access.read_text().count('"GET /elsewhere HTTP/1.1" 500') == 2, "the access log")


@needs("root_path")
def test_root_path_is_not_wsgis(serve):
    served = serve("--root-path", "/mounted")
    for address in served.both:
        assert served.show(address)["SCRIPT_NAME"] == ""
