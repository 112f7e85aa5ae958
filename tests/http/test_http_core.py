"""The HTTP core as clients meet it: slow ones, broken ones, ones that go, and what is left of them."""

import contextlib
import os
import re
import resource
import signal
import socket

import pytest
from conditions import stopped, wait_for
from free_ports import free_port
from http_client import fetch
from processes import KNOWN_NAMES, starting


@contextlib.contextmanager
def connected(where):
    if isinstance(where, str):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(where)
    else:
        sock = socket.create_connection(("127.0.0.1", where))
    sock.settimeout(60)
    with sock:
        yield sock


def until(sock, mark):
    data = b""
    while mark not in data:
        piece = sock.recv(65536)
        assert piece, data
        data += piece
    return data


def everything(sock):
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def open_sockets(pid):
    count = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
    return count


@pytest.fixture(params=["primary", "second"])
def served(request, start, port):
    """Starts the program; gives the process and where it is to be reached."""

    def begin(*arguments, workers=1, **env):
        process = start.gunicorn("http_core_app", *arguments, workers=workers, env={"P1": port, **env})
        return process.wait_ready(), process.socket if request.param == "primary" else port

    return begin


@pytest.fixture(scope="module")
def program():
    """The program with the defaults, and its two servers by name."""
    with starting() as start:
        port = free_port()
        process = start.gunicorn("http_core_app", workers=1, env={"P1": port}).wait_ready()
        yield process, {"primary": process.socket, "second": port}


@pytest.fixture(params=["primary", "second"])
def shared(request, program):
    """The program and where it is to be reached, for tests that leave it as they found it."""
    process, places = program
    return process.begin_log(), places[request.param]


# --- deadlines ---------------------------------------------------------------------------------------


def test_a_slow_head_has_one_deadline_for_all_of_it(served):
    process, where = served(PASSENGER_HEAD_TIMEOUT=1)
    with connected(where) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n")
        answered = []

        def drip():
            # a byte now and then, which would put off a timeout of each read for ever
            with contextlib.suppress(OSError):
                sock.send(b"X")
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                answered.append(sock.recv(1000))
            sock.setblocking(True)
            return answered

        wait_for(drip, "the answer to a slow head")
        assert answered[0].startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert b"Connection: close" in answered[0]
    process.wait_log(r"INFO\] The headers of a request were not complete after 1 s")
    assert fetch(where, "/calls")[1].split() == ["/"] * fetch(where, "/calls")[1].count("/ ") + ["/calls"]
    assert process.stop() == 0


def test_a_connection_without_a_byte_is_closed_without_a_word(served):
    _, where = served("--keep-alive", "30", PASSENGER_HEAD_TIMEOUT=1)
    with connected(where) as sock:
        assert everything(sock) == b""


def test_an_idle_connection_is_closed_after_keepalive_not_after_the_head_timeout(served):
    _, where = served("--keep-alive", "1", PASSENGER_HEAD_TIMEOUT=600)
    with connected(where) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert everything(sock).endswith(b"\r\n\r\nok")


def test_a_body_that_stops_is_answered_408(served):
    process, where = served(PASSENGER_BODY_TIMEOUT=1)
    for head in b"Content-Length: 10\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc":
        with connected(where) as sock:
            sock.sendall(b"POST /read HTTP/1.1\r\n" + head)
            assert everything(sock).startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    process.wait_log(r"INFO\] the client sent nothing of its request body for 1 s", 2)
    assert "Traceback" not in process.log()


def test_a_slow_body_that_keeps_coming_is_waited_for(served):
    _, where = served(PASSENGER_BODY_TIMEOUT=5)
    with connected(where) as sock:
        sock.sendall(b"POST /pieces HTTP/1.1\r\nContent-Length: 6\r\n\r\nab")
        for piece in b"cd", b"ef":
            wait_for(lambda: unread(sock) == 0)
            sock.sendall(piece)
        answer = until(sock, b"ef]")
        assert re.sub(rb"[\[\]]", b"", answer.partition(b"\r\n\r\n")[2]) == b"abcdef"


def unread(sock):
    """Bytes that the other side has not read."""
    import fcntl
    import struct
    import termios

    return struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0"))[0]


@pytest.mark.parametrize("value", ["0", "-1", "soon", "1e9"])
def test_timeouts_that_make_no_sense_stop_the_start(start, value):
    process = start.gunicorn("http_core_app", env={"PASSENGER_HEAD_TIMEOUT": value})
    assert process.wait_end() != 0
    assert process.log().count("PASSENGER_HEAD_TIMEOUT") == 1
    assert "Traceback" not in process.log()


def test_timeouts_may_be_set_by_the_program_and_by_the_operator(start, port):
    process = start.gunicorn(
        "http_core_app", env={"P1": port, "CONFIGURE": "dict(head_timeout=1)", "PASSENGER_HEAD_TIMEOUT": 600}
    ).wait_ready()
    conf = start.write(
        "gunicorn.conf.py", "import gunicorn_passenger as p\np.configure(body_timeout=1, head_timeout=600)"
    )
    other = start.gunicorn("http_core_app", "-c", conf, bind=f"unix:{start.home}/other.sock")
    other.wait_ready(f"{start.home}/other.sock")
    with connected(process.socket) as head, connected(f"{start.home}/other.sock") as body:
        head.sendall(b"GET / HT")
        body.sendall(b"POST /read HTTP/1.1\r\nContent-Length: 9\r\n\r\n")
        assert everything(head).startswith(b"HTTP/1.1 408")
        assert everything(body).startswith(b"HTTP/1.1 408")


# --- clients that go, or send too much ---------------------------------------------------------------


def test_a_half_closed_client_gets_its_answers(shared):
    _, where = shared
    with connected(where) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\nGET /pid HTTP/1.1\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        assert everything(sock).count(b"HTTP/1.1 200 OK") == 2


def test_pipelined_requests_are_answered_in_order(shared):
    _, where = shared
    with connected(where) as sock:
        sock.sendall(
            b"".join(
                b"POST /read HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (n, b"x" * n) for n in range(100)
            )
        )
        sock.shutdown(socket.SHUT_WR)
        answers = re.findall(rb"\r\n\r\n(\d+)", everything(sock))
    assert answers == [b"%d" % n for n in range(100)]


def test_a_client_that_goes_leaves_nothing(shared):
    process, where = shared
    (worker,) = process.workers()
    seen = []

    def settled():
        # the connection that asked whether the worker is ready may still be open
        seen.append(open_sockets(worker))
        return len(seen) > 20 and len(set(seen[-20:])) == 1

    wait_for(settled, lambda: f"the worker to settle: {seen[-20:]}")
    before = seen[-1]
    for sent in (
        b"",
        b"GET / HT",
        b"GET /big HTTP/1.1\r\n\r\n",
        b"POST /read HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc",
        b"POST /read HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc",
    ):
        with connected(where) as sock:
            sock.sendall(sent)
    wait_for(
        lambda: open_sockets(worker) == before, lambda: f"{open_sockets(worker)} sockets, {before} before"
    )
    assert "Traceback" not in process.log()
    assert "ERROR" not in process.log()


def test_a_truncated_body_is_not_taken_for_whole(shared):
    process, where = shared
    for head in b"Content-Length: 10\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc":
        with connected(where) as sock:
            sock.sendall(b"POST /read HTTP/1.1\r\n" + head)
            sock.shutdown(socket.SHUT_WR)
            answer = everything(sock)
            assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
            assert b"body is not complete" in answer
    assert "Traceback" not in process.log()


def test_the_response_survives_an_upload_that_is_not_read(shared):
    """The connection ends, but not with a reset that would overtake the answer."""
    _, where = shared
    for _ in range(20):
        with connected(where) as sock:
            sock.sendall(b"POST / HTTP/1.1\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 100000)
            answer = until(sock, b"ok")
            assert b"Connection: close\r\n" in answer
            # still sending, as a client does that looks for the answer at the end only
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(b"x" * 1000000)
            assert sock.recv(10) == b""


def test_a_small_unread_body_does_not_cost_the_connection(served):
    _, where = served()
    with connected(where) as sock:
        content = (b"GET /evil HTTP/1.1\r\n\r\n" * 3000)[:60000]
        for sent in (
            b"Content-Length: 60000\r\n\r\n" + content,
            b"Transfer-Encoding: chunked\r\n\r\nea60\r\n" + content + b"\r\n0\r\n\r\n",
        ):
            sock.sendall(b"POST / HTTP/1.1\r\n" + sent)
            assert b"Connection: keep-alive\r\n" in until(sock, b"ok")
        sock.sendall(b"GET /calls HTTP/1.1\r\n\r\n")
        assert b"evil" not in until(sock, b"/calls")


def test_a_refused_request_ends_the_connection(shared):
    process, where = shared
    with connected(where) as sock:
        sock.sendall(
            b"POST /smuggled HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"0\r\n\r\nGET /after HTTP/1.1\r\n\r\n"
        )
        answer = everything(sock)
    assert answer.count(b"HTTP/1.1") == 1
    assert answer.startswith(b"HTTP/1.1 400 ")
    calls = fetch(where, "/calls")[1]
    assert "smuggled" not in calls
    assert "after" not in calls
    process.wait_log(r"WARNING\] Invalid request from ip=")


def test_a_body_cannot_be_read_when_its_request_is_over(shared):
    _, where = shared
    with connected(where) as sock:
        sock.sendall(b"POST /keep HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc")
        until(sock, b"ok")
        sock.sendall(b"POST /kept HTTP/1.1\r\nContent-Length: 6\r\n\r\nsecret")
        sock.shutdown(socket.SHUT_WR)
        assert everything(sock).endswith(b"\r\n\r\n")


def test_a_big_answer_to_a_slow_reader_arrives_whole(shared):
    _, where = shared
    with connected(where) as slow, connected(where) as other:
        slow.sendall(b"GET /big HTTP/1.1\r\n\r\n")
        until(slow, b"\r\n\r\n")
        # meanwhile others are served
        other.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert until(other, b"ok")
        slow.shutdown(socket.SHUT_WR)
        assert everything(slow).endswith(b"x" * 1000 + b"y" * 10_000_000)


def test_responses_that_are_read_late_arrive_whole_and_in_order(shared):
    """Held back or not, cut by a full socket or not: what is sent is what was answered."""
    _, where = shared
    numbers = [b"%04d" % n for n in range(50)]  # so many requests fit into a socket unread
    with connected(where) as patient, connected(where) as pipelining:
        for number in numbers:
            patient.sendall(b"GET /blob?%s HTTP/1.1\r\n\r\n" % number)
        pipelining.sendall(b"".join(b"GET /blob?%s HTTP/1.1\r\n\r\n" % number for number in numbers))
        for sock in patient, pipelining:
            sock.shutdown(socket.SHUT_WR)
            bodies = re.split(rb"HTTP/1\.1 200 OK\r\n.*?\r\n\r\n", everything(sock), flags=re.DOTALL)[1:]
            assert bodies == [number * 3000 for number in numbers]


def test_many_clients_at_once_get_their_own_answers(shared):
    _, where = shared
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connected(where)) for _ in range(50)]
        for turn in range(20):
            for n, sock in enumerate(socks):
                sock.sendall(b"GET /blob?%02d%02d HTTP/1.1\r\n\r\n" % (n, turn))
            for n, sock in enumerate(socks):
                body = until(sock, b"\r\n\r\n").partition(b"\r\n\r\n")[2]
                while len(body) < 12000:
                    body += sock.recv(12000)
                assert body == b"%02d%02d" % (n, turn) * 3000


@pytest.mark.parametrize(
    "sent",
    [
        b"Content-Length: 37\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: abc\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n25\r\nGET /smuggled HTTP/1.1\r\nHost: abc\r\n\r\n\r\n0\r\n\r\n",
        b"Upgrade: h2c\r\nContent-Length: 37\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: abc\r\n\r\n",
    ],
)
@pytest.mark.parametrize("path", [b"/echo", b"/"])
def test_a_body_is_never_read_as_a_request_even_after_a_pause(served, sent, path):
    process, where = served("--keep-alive", "600")
    (worker,) = process.workers()
    with connected(where) as sock:
        for _ in range(3):
            sock.sendall(b"POST " + path + b" HTTP/1.1\r\n" + sent)
            until(sock, b"Host: abc\r\n\r\n" if path == b"/echo" else b"ok")
            # a pause for which a connection does not keep its greenlet
            wait_for(lambda: fetch(where, "/parked", Connection="close")[1] == "1", "the pause")
        sock.sendall(b"GET /calls HTTP/1.1\r\nConnection: close\r\n\r\n")
        answer = everything(sock)
    assert answer.count(b"HTTP/1.1 200") == 1
    assert b"/smuggled" not in answer
    assert process.workers() == [worker]


def test_upgrade_requests_that_are_not_taken_up_are_plain_requests(shared):
    _, where = shared
    with connected(where) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nUpgrade: h2c\r\n\r\nGET /pid HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert everything(sock).count(b"HTTP/1.1 200") == 2


def test_a_body_that_is_dropped_is_counted_with_its_framing(shared):
    _, where = shared
    with connected(where) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        until(sock, b"ok")
        for _ in range(30):  # 30 bytes of a body, in 210 kB
            sock.sendall(b"1;" + b"x" * 7000 + b"\r\na\r\n")
        assert sock.recv(10) == b""


def test_trailers_have_a_limit(shared):
    _, where = shared
    with connected(where) as sock:
        sock.sendall(b"POST /read HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
        sock.sendall(b"".join(b"X-%d: %s\r\n" % (n, b"x" * 1000) for n in range(80)))
        assert everything(sock).startswith(b"HTTP/1.1 431 ")


def test_a_greenlet_that_reads_on_after_the_response_holds_nothing(served):
    process, where = served("--keep-alive", "600", "--graceful-timeout", "600")
    (worker,) = process.workers()
    before = open_sockets(worker)
    for _ in range(5):
        with connected(where) as sock:
            sock.sendall(b"POST /other-greenlet HTTP/1.1\r\nContent-Length: 10\r\n\r\n1")
            until(sock, b"ok")
    wait_for(lambda: len(fetch(where, "/outcomes")[1].split()) == 5)
    wait_for(lambda: open_sockets(worker) <= before)
    assert "read" not in fetch(where, "/outcomes")[1].split()
    assert process.stop() == 0


def test_what_a_client_leaves_in_a_local_is_not_anothers(shared):
    _, where = shared
    for n in range(20):
        assert fetch(where, f"/local?{n}") == (200, "unset")


def test_a_bug_that_raises_stop_iteration_is_answered_500(served):
    process, where = served()
    assert fetch(where, "/stop")[0] == 500
    process.wait_log("Error handling request")


def test_wsgi_errors_cannot_be_closed(shared):
    process, where = shared
    for _ in range(3):
        assert fetch(where, "/errors")[0] == 200
    process.wait_log("to the log", 3)


def test_the_access_log_tells_what_came(served):
    process, where = served("--access-logfile", "-", "--access-logformat", "who=%({x-who}i)s")
    assert fetch(where, "/change", X_Who="sent")[0] == 200
    process.wait_log("who=sent")
    assert "who=changed" not in process.log()


def test_clients_that_are_turned_away_are_in_the_access_log(served):
    process, where = served("--access-logfile", "-", PASSENGER_BODY_TIMEOUT=1)
    for cut in True, False:
        with connected(where) as sock:
            sock.sendall(b"POST /read HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc")
            if cut:
                sock.shutdown(socket.SHUT_WR)
            everything(sock)
    process.wait_log('"POST /read HTTP/1.1" 400')
    process.wait_log('"POST /read HTTP/1.1" 408')


def test_more_requests_than_the_last_do_not_reset_the_last_answer(served):
    process, where = served("--keep-alive", "600")
    with connected(where) as sock:
        sock.sendall(b"GET /sleep?0.1 HTTP/1.1\r\n\r\n" * 1000)
        process.signal(signal.SIGHUP)
        data = everything(sock)  # no reset
        assert 1 <= data.count(b"HTTP/1.1 200") < 1000
        assert data.count(b"Connection: close") == 1


# --- applications that fail --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/oserror", "/exit", "/timeout"])
def test_an_application_that_fails_is_answered_500(served, path):
    process, where = served("--access-logfile", "-")
    with connected(where) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n".encode())
        answer = everything(sock)
    assert answer.startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    assert answer.count(b"HTTP/1.1") == 1
    process.wait_log(rf"ERROR\] Error handling request {path}|ERROR\] Error handling request GET {path}")
    process.wait_log(rf'"GET {path} HTTP/1.1" 500')
    assert fetch(where)[0] == 200  # in the same worker
    assert len(process.workers()) == 1
    assert "Booting" in process.log()
    assert process.log().count("Booting") == 1


def test_an_answer_that_breaks_off_is_seen_to_be_broken(served):
    process, where = served()
    with connected(where) as sock:
        sock.sendall(b"GET /middle HTTP/1.1\r\n\r\n")
        answer = everything(sock)
    assert answer.endswith(b"5\r\nbegun\r\n")
    process.wait_log("RuntimeError: in the middle")
    if isinstance(where, int):
        # an answer that ends with its connection can only be seen to be broken by a reset
        with connected(where) as sock:
            sock.sendall(b"GET /middle HTTP/1.0\r\n\r\n")
            until(sock, b"begun")
            with pytest.raises(ConnectionResetError):
                everything(sock)


def test_an_application_may_take_the_connection(shared):
    process, where = shared
    with connected(where) as sock:
        sock.sendall(b"GET /taken HTTP/1.1\r\n\r\n")
        assert everything(sock) == b"HTTP/1.1 101 Mine\r\n\r\nhello"
    assert "ERROR" not in process.log()


def test_an_application_that_takes_the_connection_gets_what_came_with_the_request(shared):
    _, where = shared
    with connected(where) as sock:
        sock.sendall(b"GET /early HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\nearly bytes")
        assert everything(sock) == b"HTTP/1.1 101 Mine\r\n\r\nearly bytes"


def test_a_client_that_reads_nothing_is_given_up(served):
    """FAULTS A13."""
    process, where = served(PASSENGER_WRITE_TIMEOUT="0.5")
    (worker,) = process.workers()
    fetch(where)
    before = open_sockets(worker)
    with connected(where) as sock:
        sock.sendall(b"GET /big HTTP/1.1\r\n\r\n")
        wait_for(lambda: "/big" in fetch(where, "/calls")[1])
        wait_for(lambda: open_sockets(worker) <= before, "the end of the connection")


@pytest.mark.parametrize("path", ["/interrupted", "/interrupted?length"])
def test_an_interrupted_write_ends_the_connection(served, path):
    """FAULTS A14: nothing follows a chunk of which the rest is missing."""
    process, where = served()
    with connected(where) as sock:
        # the second request was read together with the first
        sock.sendall(b"GET %b HTTP/1.1\r\n\r\nGET /pid HTTP/1.1\r\n\r\n" % path.encode())
        expected = "interrupted" if "length" in path else "interrupted ClientDisconnected"
        wait_for(lambda: fetch(where, "/outcomes")[1] == expected)
        data = b""
        with contextlib.suppress(ConnectionError):
            while piece := sock.recv(1 << 20):
                data += piece
        assert data.count(b"HTTP/1.1") <= 1
        assert len(data) < 20_000_000
        assert not data.endswith(b"0\r\n\r\n")
    assert "/pid" not in fetch(where, "/calls")[1]
    assert "ERROR" not in process.log()


def test_a_forked_child_serves_no_client_of_the_worker(served):
    """FAULTS A14: whether its connection was idle, parked, or busy."""
    process, where = served("--keep-alive", "600")
    (worker,) = process.workers()
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connected(where)) for _ in range(10)]
        for sock in socks[:5]:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            until(sock, b"ok")
        wait_for(lambda: fetch(where, "/parked")[1] == "10")
        for sock in socks[5:]:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            until(sock, b"ok")
        socks[0].sendall(b"GET /big HTTP/1.1\r\n\r\n")
        _, _, body = until(socks[0], b"xxx").partition(b"\r\n\r\n")
        child = int(fetch(where, "/fork")[1])
        try:
            for _ in range(20):
                for sock in socks[1:]:
                    sock.sendall(b"GET /pid HTTP/1.1\r\n\r\n")
                    assert until(sock, b"\r\n\r\n%d" % worker)
            while len(body) < 20_000_000:
                body += socks[0].recv(1 << 20)
            assert body == b"x" * 10_000_000 + b"y" * 10_000_000
        finally:
            os.kill(child, signal.SIGKILL)


def test_clients_that_vanish_are_noticed(shared):
    """FAULTS P5: the kernel probes TCP connections; a UNIX socket needs no probes."""
    _, where = shared
    alive, *values = map(int, fetch(where, "/keepalive")[1].split())
    if isinstance(where, str):
        assert (alive, values) == (0, [])
    else:
        idle, interval, probes = values
        assert alive and idle + interval * probes <= 120


def test_what_an_application_leaves_in_a_local_stays_as_long_as_the_connection(served):
    """FAULTS S6: a database connection for each thread survives the pauses of a client."""
    _, where = served("--keep-alive", "600")
    with connected(where) as with_local, connected(where) as without:
        for number in range(3):
            with_local.sendall(b"GET /local?%d HTTP/1.1\r\n\r\n" % number)
            until(with_local, b"\r\n\r\n" + (b"%d" % (number - 1) if number else b"unset"))
            without.sendall(b"GET / HTTP/1.1\r\n\r\n")
            until(without, b"ok")
            # the other has been idle for longer than the one that has given up its greenlet
            wait_for(lambda: fetch(where, "/parked")[1] == "1")


def test_a_connection_with_locals_ends_after_keepalive(served):
    _, where = served("--keep-alive", "1")
    with connected(where) as sock:
        sock.sendall(b"GET /local?a HTTP/1.1\r\n\r\n")
        until(sock, b"unset")
        assert everything(sock) == b""


def test_an_exception_of_the_application_counts_as_an_error(served):
    """FAULTS N4."""
    _, where = served()
    for path, errors in (("/oserror", 1), ("/oserror", 2), ("/nothing", 2), ("/stop", 3)):
        fetch(where, path)
        assert fetch(where, "/errors-counted")[1] == str(errors)
    with connected(where) as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        assert b" 400 " in everything(sock)
    assert fetch(where, "/errors-counted")[1] == "3"


# --- limits ------------------------------------------------------------------------------------------


def test_idle_connections_make_room(served):
    """FAULTS S10: they do not keep new clients out, also where they keep their greenlet."""
    _, where = served("--worker-connections", "1", "--keep-alive", "600")
    with contextlib.ExitStack() as stack:
        last = None
        for path in (b"/", b"/local?x", b"/", b"/local?y"):
            sock = stack.enter_context(connected(where))
            sock.sendall(b"GET %b HTTP/1.1\r\n\r\n" % path)
            until(sock, b"unset" if path.startswith(b"/local") else b"ok")
            assert last is None or everything(last) == b""
            last = sock


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_idle_connections_make_room_for_clients_that_come_together(served, version):
    """The greenlet of the one before accepts each of them, as long as there is room."""
    process, where = served("--worker-connections", "3", "--keep-alive", "600")
    (worker,) = process.workers()
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connected(where)) for _ in range(2)]
        for sock in idle:
            # one that keeps its greenlet
            sock.sendall(b"GET /local?x HTTP/1.1\r\n\r\n")
            until(sock, b"unset")
        with stopped(worker):
            socks = [stack.enter_context(connected(where)) for _ in range(8)]
            for sock in socks:
                sock.sendall(f"GET / HTTP/{version}\r\n\r\n".encode())
        for sock in socks:
            until(sock, b"ok")
        if version == "1.1":
            assert [everything(sock) for sock in idle] == [b"", b""]


def test_connections_that_send_nothing_make_room(served):
    """FAULTS A13: they have the keep-alive time when the places are taken."""
    _, where = served("--worker-connections", "3", "--keep-alive", "1", PASSENGER_HEAD_TIMEOUT=600)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(where)) for _ in range(3)]
        asking = stack.enter_context(connected(where))
        asking.sendall(b"GET / HTTP/1.1\r\n\r\n")
        until(asking, b"ok")
        assert everything(silent[0]) == b""
        for sock in silent[1:]:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            until(sock, b"ok")


def test_a_worker_without_descriptors_lets_connections_wait(served):
    process, where = served()
    (worker,) = process.workers()
    used = len(os.listdir(f"/proc/{worker}/fd"))
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (used + 2, used + 2))
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connected(where)) for _ in range(6)]
        process.wait_log(
            r"ERROR\] Cannot accept connections: Too many open files; they wait\. Raise the limit"
        )
        for sock in socks[:3]:
            sock.close()
        # those that waited are served
        for sock in socks[3:5]:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        for sock in socks[3:5]:
            assert b"200 OK" in everything(sock)
    assert process.log().count("Cannot accept") == 1
    assert fetch(where)[0] == 200
    assert process.workers() == [worker]


# --- leaving -----------------------------------------------------------------------------------------


def test_connections_without_a_request_do_not_hold_a_leaving_worker(served):
    """Neither one that never sent a byte nor an idle one is waited for longer than keepalive."""
    process, where = served("--keep-alive", "1", "--graceful-timeout", "600", PASSENGER_HEAD_TIMEOUT=600)
    with connected(where) as silent, connected(where) as idle:
        idle.sendall(b"GET / HTTP/1.1\r\n\r\n")
        until(idle, b"ok")
        process.signal(signal.SIGTERM)
        assert everything(silent) == b""
        assert everything(idle) == b""
        assert process.wait_end() == 0


def test_a_leaving_worker_says_so_and_finishes(served):
    process, where = served("--keep-alive", "600", "--graceful-timeout", "600")
    with connected(where) as sock:
        sock.sendall(b"GET /sleep?1 HTTP/1.1\r\n\r\n")
        wait_for(lambda: "/sleep" in fetch(where, "/calls")[1])
        process.signal(signal.SIGTERM)
        answer = everything(sock)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"Connection: close" in answer
    assert process.wait_end() == 0


# --- what is left to gunicorn ------------------------------------------------------------------------


def test_what_our_handler_does_not_do_is_gunicorns_and_is_said(start, port):
    process = start.gunicorn(
        "http_core_app",
        "--proxy-protocol",
        "--proxy-allow-from",
        "*",
        "--log-level",
        "debug",
        env={"P1": port},
    ).wait_ready(port)
    process.wait_log(
        r"DEBUG\] gunicorn's own handler serves unix:.*app.sock, because the PROXY protocol is configured", 2
    )
    assert f"gunicorn's own handler serves 127.0.0.1:{port}" not in process.log()
    with connected(process.socket) as sock:
        sock.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nGET /pid HTTP/1.0\r\n\r\n")
        assert b"200 OK" in everything(sock)


if "protocol" in KNOWN_NAMES:  # gunicorn 23 knows no uwsgi protocol

    def test_uwsgi_protocol_is_gunicorns(start, port):
        process = start.gunicorn(
            "http_core_app", "--protocol", "uwsgi", "--log-level", "debug", env={"P1": port}
        ).wait_ready(port)
        process.wait_log(
            r"gunicorn's own handler serves .*app.sock, because the uwsgi protocol is configured"
        )


def test_compatibility_settings_are_parsed_by_gunicorn_and_served_by_us(start, port):
    process = start.gunicorn(
        "http_core_app", "--permit-obsolete-folding", "--log-level", "debug", env={"P1": port}
    )
    process.wait_ready(port)
    process.wait_log(
        r"DEBUG\] .*: gunicorn's Python parser, which is slower, parses the requests: permit_obsolete_folding is set"
    )
    with connected(process.socket) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nA: b\r\n c\r\nConnection: close\r\n\r\n")
        assert b"200 OK" in everything(sock)


# --- giving connections away, for what comes next ----------------------------------------------------


def test_a_connection_can_be_taken_over_between_requests(start):
    script = start.write(
        "takeover.py",
        """
        import gevent, gevent.monkey; gevent.monkey.patch_all()
        import threading
        from gevent import socket
        from gunicorn.config import Config
        from gunicorn_passenger.http.acceptor import Acceptor
        from gunicorn_passenger.http.listener_context import ListenerContext, StandaloneWorker
        from gunicorn_passenger.config.settings import Timeouts

        cfg, local = Config(), threading.local()
        def acceptor(name):
            def app(environ, start_response):
                if environ["QUERY_STRING"]:
                    local.left = name
                start_response("200 OK", [("Content-Length", "1")])
                return [name]
            listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen()
            gate = ListenerContext(app, cfg, cfg.logger_class(cfg), StandaloneWorker(), listener.getsockname(), Timeouts())
            return Acceptor(listener, gate, 10)
        first, second = acceptor(b"1"), acceptor(b"2")
        first.start()
        client = socket.create_connection(first._sock.getsockname())

        def ask(requests):
            client.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n" * requests)
            got = b""
            while got.count(b"HTTP/1.1 200") < requests or got[-1:] not in b"12":
                got += client.recv(1000)
            return [part[-1:] for part in got.split(b"HTTP/1.1 200")[1:]]

        assert ask(2) == [b"1", b"1"]
        assert first.pop_idle_connections(5) == []  # its greenlet still waits for the next request

        def migrate(source, target):
            while not (idle := source.pop_idle_connections(5)):
                gevent.sleep(0.01)
            target.attach(*idle[0], begun=True)

        migrate(first, second)
        assert ask(2) == [b"2", b"2"]
        assert first.idle() and not second.idle()
        migrate(second, first)
        assert ask(3) == [b"1", b"1", b"1"]
        assert second.idle() and first.counts().connections == 1

        # one that has something in a local keeps its greenlet until its worker drains
        client.sendall(b"GET /?keep HTTP/1.1\\r\\n\\r\\n")
        while not client.recv(1000).endswith(b"1"):
            pass
        (connection,) = first._connections
        while connection.tracked:
            gevent.sleep(0.01)
        assert first.pop_idle_connections(1) == []
        first.stop_accepting()
        migrate(first, second)
        assert ask(2) == [b"2", b"2"]
        print("all well")
        """,
    )
    process = start.python(script)
    assert process.wait_end() == 0, process.log()
    assert "all well" in process.log()
