"""``retry_statuses``: the next target gets a request that may be repeated, when one has failed with such a status."""

import pytest
from free_ports import free_port
from proxy_laboratory import Origin, answer, get, request
from upstream_sockets import Upstream, connect


class Failing(Origin):
    """A target that always responds with this status."""

    def reply(self, message):
        return answer(self.label.decode())


BOTH = "['http://127.0.0.1:{}', 'http://127.0.0.1:{}']"
OPTION = "retry_statuses=[502, 503, 504]"


def serve(lab, bad, good, options=OPTION):
    return lab.serve(f"{BOTH.format(bad, good)}, {options}")


@pytest.mark.parametrize("status", ["502 Bad Gateway", "503 Busy", "504 Late"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT"])
def test_the_next_target_gets_the_request(lab, status, method):
    bad, good = free_port(), free_port()
    body = b"body" if method == "PUT" else b""
    with Failing(bad, status.encode()) as failing, Origin(good) as working:
        where = serve(lab, bad, good)
        for _ in range(4):
            assert get(where, request("/x", method=method, body=body)).status == 200
        assert len(failing.requests) == 1  # it is skipped for fail_timeout then
        assert [message.text for _, message in working.requests] == [body] * 4
    lab.wait_log(f"it responded with {status}; the next target is tried")


@pytest.mark.parametrize(
    ("status", "sent", "options"),
    [
        ("503 Busy", request("/x", method="POST", body=b"body"), OPTION),
        ("503 Busy", request("/x", method="PATCH"), OPTION),
        ("503 Busy", request("/x"), "retry_statuses=[502]"),
        ("503 Busy", request("/x"), "retry_statuses=()"),
        ("500 Error", request("/x"), OPTION),
    ],
)
def test_other_responses_go_to_the_client(lab, status, sent, options):
    bad, good = free_port(), free_port()
    with Failing(bad, status.encode()), Origin(good) as working:
        assert get(serve(lab, bad, good, options), sent).status == int(status[:3])
        assert working.requests == []


def test_the_last_response_goes_to_the_client(lab):
    first, second = free_port(), free_port()
    with Failing(first, b"502 First") as one, Failing(second, b"503 Second") as two:
        came = get(serve(lab, first, second))
        assert came.start == "HTTP/1.1 503 Second"
        assert (len(one.requests), len(two.requests)) == (1, 1)


@pytest.mark.parametrize("reply", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Le"])
def test_a_target_that_responds_with_nothing_useful(lab, reply):
    bad, good = free_port(), free_port()
    with Upstream(bad) as failing, Origin(good), connect(serve(lab, bad, good)) as client:
        client.send(request("/x"))
        wire = failing.accept()
        wire.head()
        wire.send(reply)
        wire.close()
        assert client.response()[0].startswith(b"HTTP/1.1 200")


def test_a_target_that_is_silent(lab):
    bad, good = free_port(), free_port()
    with Upstream(bad) as failing, Origin(good):
        where = serve(lab, bad, good, f"{OPTION}, proxy_timeout=0.2")
        assert get(where).status == 200
        failing.accept().head()
    lab.wait_log("it has not responded for 0.2 s; the next target is tried")


def test_a_sticky_client_gets_the_cookie_of_the_target_that_has_responded(lab):
    bad, good = free_port(), free_port()
    with Failing(bad, b"503 Busy"), Origin(good):
        where = serve(lab, bad, good, f"{OPTION}, sticky='cookie'")
        (cookie,) = {get(where).get("set-cookie")[0] for _ in range(3)}
        assert get(where, request("/", f"Cookie: {cookie.partition(';')[0]}")).get("set-cookie") == []
