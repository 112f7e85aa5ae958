"""What test_beside_peers.py sends through three proxies, and why they differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DATE = "Date: Thu, 01 Jan 2026 00:00:00 GMT"


def answer(*fields: str, status: str = "200 OK", body: bytes = b"answer", framing: str = "length") -> bytes:
    """A scripted answer. ``X-Upstream`` tells it from what a proxy says by itself."""
    lines = [f"HTTP/1.1 {status}", "X-Upstream: yes", "Server: recorder", DATE, *fields]
    if framing == "length":
        lines.append(f"Content-Length: {len(body)}")
    if framing == "chunked":
        lines.append("Transfer-Encoding: chunked")
        body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n"
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def request(
    target: str = "/", *fields: str, method: str = "GET", body: bytes = b"", host: str | None = "example.test"
) -> bytes:
    """A request of HTTP/1.1; the body as it is, the framing is among the fields."""
    lines = [f"{method} {target} HTTP/1.1", *([f"Host: {host}"] if host is not None else []), *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def post(body: bytes = b"hello", *fields: str, method: str = "POST", target: str = "/") -> bytes:
    return request(target, *fields, f"Content-Length: {len(body)}", method=method, body=body)


def chunked(wire: bytes = b"5\r\nhello\r\n0\r\n\r\n", *fields: str, method: str = "POST") -> bytes:
    return request("/", *fields, "Transfer-Encoding: chunked", method=method, body=wire)


@dataclass(frozen=True)
class Case:
    """Bytes of a client, and what the upstream answers to each request but the probe."""

    name: str
    send: bytes
    answer: bytes = answer()
    #: how many final answers there are
    count: int = 1
    #: what the upstream does after its answer: "" (keep the connection), "close" or "reset"
    then: str = ""
    #: compare the order of the X- fields
    order: bool = False
    #: compare the letter case of names
    letters: bool = False
    #: the peers that never answer, which takes no waiting to see: nothing comes in half a second
    hangs: tuple[str, ...] = ()
    #: sent when 101 or 100 has come
    after: bytes = b""
    #: the upstream says 100 Continue when it is asked to
    continues: bool = False


OK = answer()

METHODS = [
    Case("GET", request("/path?query=1", "Accept: text/html", "User-Agent: test/1.0")),
    Case("HEAD", request(method="HEAD"), answer(body=b"")),
    Case("HEAD: a length without its body", request(method="HEAD"), answer("Content-Length: 500", framing="", body=b"")),
    Case("POST", post()),
    Case("PUT", post(method="PUT")),
    Case("PATCH", post(method="PATCH")),
    Case("DELETE", request(method="DELETE")),
    Case("DELETE with a body", post(method="DELETE")),
    Case("DELETE chunked", chunked(method="DELETE"), answer("Connection: close")),
    Case("OPTIONS", request("/path", method="OPTIONS")),
    Case("OPTIONS *", request("*", method="OPTIONS")),
    Case("OPTIONS chunked", chunked(method="OPTIONS"), answer("Connection: close")),
    Case("TRACE", request(method="TRACE")),
    Case("CONNECT", request("example.test:443", method="CONNECT", host="example.test:443")),
    Case("PROPFIND with a body", post(method="PROPFIND")),
    Case("an unknown method", request(method="BREW")),
    Case("a method in small letters", request(method="get")),
    Case("GET with a body", post(method="GET")),
    Case("GET chunked", chunked(method="GET")),
]  # fmt: skip

FRAMINGS = [
    Case("chunked", chunked()),
    Case("chunked, several", chunked(b"1\r\nh\r\n04\r\nello\r\n000\r\n\r\n")),
    Case("chunked, with an extension", chunked(b'5;name="value"\r\nhello\r\n0;last\r\n\r\n')),
    Case("chunked, with a trailer", chunked(b"5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n")),
    Case("chunked, with a trailer that was announced", chunked(b"5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n", "Trailer: X-Sum")),
    Case("chunked, of nothing", chunked(b"0\r\n\r\n")),
    Case("POST of nothing", post(b"")),
    Case("POST without a framing", request(method="POST")),
    Case("two framings", request("/", "Content-Length: 5", "Transfer-Encoding: chunked", method="POST", body=b"0\r\n\r\n")),
    Case("a length twice", request("/", "Content-Length: 5", "Content-Length: 5", method="POST", body=b"hello")),
    Case("two lengths", request("/", "Content-Length: 5", "Content-Length: 6", method="POST", body=b"hello!")),
    Case("a list of lengths", request("/", "Content-Length: 5, 5", method="POST", body=b"hello")),
    Case("a length with a sign", request("/", "Content-Length: +5", method="POST", body=b"hello")),
    Case("a length in hex", request("/", "Content-Length: 0x5", method="POST", body=b"hello")),
    Case("a coding that is not chunked", request("/", "Transfer-Encoding: gzip, chunked", method="POST", body=b"0\r\n\r\n")),
    Case("identity as a coding", request("/", "Transfer-Encoding: identity", "Content-Length: 5", method="POST", body=b"hello")),
    Case("chunked twice", request("/", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked", method="POST", body=b"0\r\n\r\n")),
    Case("Chunked in another letter case", request("/", "Transfer-Encoding: CHUNKED", method="POST", body=b"5\r\nhello\r\n0\r\n\r\n")),
    Case("a vertical tab before chunked", request("/", "Transfer-Encoding: \x0bchunked", method="POST", body=b"0\r\n\r\n")),
    Case("a malformed chunk size", chunked(b"zz\r\nhello\r\n0\r\n\r\n")),
]  # fmt: skip

FIELDS = [
    Case("a field twice", request("/", "X-A: 1", "X-A: 2")),
    Case("Cookie twice", request("/", "Cookie: a=1", "Cookie: b=2")),
    Case("the order of fields", request("/", "X-B: 1", "X-A: 2", "X-C: 3", "X-A: 4"), order=True),
    Case("the letter case of names", request("/", "X-mIxEd: 1"), answer("X-aNsWeR: 1"), letters=True),
    Case("an empty value", request("/", "X-A:")),
    Case("space around a value", request("/", "X-A:  \t a  b \t ")),
    Case("a tab in a value", request("/", "X-A: a\tb")),
    Case("bytes beyond ASCII in a value", request("/", "X-A: \xe9\xff")),
    Case("UTF-8 in a value", request("/", "X-A: \xc3\xa9")),
    Case("a control character in a value", request("/", "X-A: a\x01b")),
    Case("a NUL in a value", request("/", "X-A: a\0b")),
    Case("an underscore in a name", request("/", "X_A: 1")),
    Case("a dot in a name", request("/", "X.A: 1")),
    Case("odd characters in a name", request("/", "X!#$%&'*+^`|~: 1")),
    Case("a space in a name", request("/", "X A: 1")),
    Case("a space before the colon", request("/", "X-A : 1")),
    Case("no name", request("/", ": 1")),
    Case("no colon", request("/", "X-A")),
    Case("a folded line", request("/", "X-A: a\r\n b")),
    Case("a line that ends in LF", request("/", "X-A: 1\nX-B: 2")),
    Case("a CR in a value", request("/", "X-A: a\rb")),
    Case("a long value", request("/", "X-A: " + "a" * 7000)),
    Case("a value that is too long", request("/", "X-A: " + "a" * 40000)),
    Case("ninety fields", request("/", *(f"X-{number}: {number}" for number in range(90)))),
    Case("fields of the caller", request("/", "Authorization: Basic eDp5", "Origin: http://a", "Referer: http://b/c", "Range: bytes=0-1", "If-None-Match: \"x\"", "Accept-Encoding: gzip", "Cache-Control: no-cache", "Pragma: no-cache", "Date: Thu, 01 Jan 2026 00:00:00 GMT", "From: x@y", "Via: 1.0 fred")),
    Case("X-Forwarded of the caller", request("/", "X-Forwarded-For: 203.0.113.1", "X-Forwarded-Proto: https", "Forwarded: for=203.0.113.1")),
    Case("an empty line before the request", b"\r\n" + request()),
    Case("no Host", request(host=None)),
    Case("two Hosts", request("/", "Host: other.test")),
    Case("an empty Host", request(host="")),
    Case("a Host with a path", request(host="example.test/path")),
    Case("a Host with a user", request(host="user@example.test")),
    Case("a Host with a port", request(host="EXAMPLE.test:8080")),
    Case("Host, an IPv6 address", request(host="[::1]:80")),
]  # fmt: skip

TARGETS = [
    Case(f"target {target}", request(target))
    for target in [
        "/a%20b/%2F?q=%41", "/%2f%c3%a9", "//double//slash", "/a/../b", "/a/./b", "/a/%2e%2e/b", "/../up", "/?", "/?a=1&a=2&=&&",
        "/a?b?c", "/a;b=c,d", "/~user/!$&'()*+,=:@", '/a|b"c<d>', "/{a}", "/a\\b", "/%zz", "/%", "/%00", "/a#fragment",
        "/\xc3\xa9?\xc3\xa9", "/a^b`c", "/http://example.org/", "/a?http://example.org/", "nothing", "?query",
    ]
] + [
    Case("a long target", request("/" + "a" * 3900)),
    Case("a target that is too long", request("/" + "a" * 40000)),
    Case("an absolute target", request("http://example.test/path?q")),
    Case("an absolute target of another host", request("http://other.test:81/path")),
    Case("an absolute target without a path", request("http://example.test")),
    Case("an absolute target without a path, with a query", request("http://example.test?q=1")),
    Case("an absolute target by https", request("https://example.test/path")),
    Case("an absolute target with a user", request("http://user:password@example.test/path")),
    Case("a target with a space", request("/a b")),
]  # fmt: skip

HOPS = [
    Case("Connection: close", request("/", "Connection: close")),
    Case("Connection names a field", request("/", "Connection: X-Hop", "X-Hop: secret", "X-Other: 1")),
    Case("Connection names what is for the other end", request("/", "Connection: close, Authorization, X-Forwarded-For", "Authorization: Basic eDp5", "X-Forwarded-For: 203.0.113.1")),
    Case("Connection names Host", request("/", "Connection: Host")),
    Case("Keep-Alive", request("/", "Connection: keep-alive", "Keep-Alive: timeout=5")),
    Case("TE", request("/", "TE: trailers, deflate;q=0.5", "Connection: TE")),
    Case("Proxy-Authorization", request("/", "Proxy-Authorization: Basic eDp5")),
    Case("Proxy-Connection", request("/", "Proxy-Connection: keep-alive")),
    Case("Upgrade that Connection does not name", request("/", "Upgrade: echo")),
    Case("HTTP2-Settings", request("/", "Connection: HTTP2-Settings", "HTTP2-Settings: AAMAAABk")),
    Case("Max-Forwards", request("/", "Max-Forwards: 0", method="OPTIONS")),
    Case("Proxy", request("/", "Proxy: http://evil.test")),
]  # fmt: skip

EXPECTATIONS = [
    Case("Expect: 100-continue", post(b"", "Expect: 100-continue").replace(b"Length: 0", b"Length: 5"), continues=True, after=b"hello"),
    Case("Expect: 100-continue, with the body behind it", post(b"hello", "Expect: 100-continue"), continues=True),
    Case("Expect: 100-continue, refused", post(b"", "Expect: 100-continue").replace(b"Length: 0", b"Length: 5"), answer("Connection: close", status="417 No"), after=b"hello"),
    Case("Expect: something else", post(b"hello", "Expect: something")),
]  # fmt: skip

SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nX-Upstream: yes\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
UPGRADE = ("Connection: Upgrade", "Upgrade: websocket")

UPGRADES = [
    Case("an upgrade", request("/", *UPGRADE), SWITCH, after=b"hello"),
    Case("an upgrade, with bytes that came early", request("/", *UPGRADE, body=b"early"), SWITCH, after=b"hello"),
    Case("an upgrade, and the upstream speaks first", request("/", *UPGRADE), SWITCH + b"first", after=b"hello"),
    Case("an upgrade that is refused", request("/", *UPGRADE), answer("Connection: close", status="403 Forbidden")),
    Case("an upgrade that is refused, kept", request("/", *UPGRADE), answer(status="403 Forbidden")),
    Case("an upgrade that is ignored", request("/", *UPGRADE), OK),
    Case("an upgrade with POST", post(b"hello", *UPGRADE), OK),
    Case("an upgrade in a list of others", request("/", "Connection: keep-alive, Upgrade", "Upgrade: websocket"), SWITCH, after=b"hello"),
    Case("an upgrade to another protocol", request("/", "Connection: Upgrade", "Upgrade: echo"), SWITCH.replace(b"websocket", b"echo"), after=b"hello"),
    Case("an upgrade to one of two protocols", request("/", "Connection: Upgrade", "Upgrade: echo, other"), SWITCH.replace(b"websocket", b"echo"), after=b"hello"),
    Case("an unsolicited switch", request(), SWITCH, then="close", hangs=("node",)),
]  # fmt: skip


def close_delimited(body: bytes = b"answer", *fields: str, status: str = "200 OK") -> bytes:
    return answer(*fields, status=status, body=body, framing="")


ANSWERS = [
    Case("an answer with a length", request(), OK),
    Case("an answer in chunks", request(), answer(framing="chunked")),
    Case("an answer in chunks of nothing", request(), answer(framing="chunked", body=b"")),
    Case("an answer that ends with its connection", request(), close_delimited(), then="close"),
    Case("an answer with a trailer", request("/", "TE: trailers", "Connection: TE"), answer("Trailer: X-Sum", "Transfer-Encoding: chunked", framing="", body=b"6\r\nanswer\r\n0\r\nX-Sum: 1\r\n\r\n")),
    Case("an answer with an extension of a chunk", request(), answer("Transfer-Encoding: chunked", framing="", body=b"6;a=b\r\nanswer\r\n0\r\n\r\n")),
    Case("204", request(), answer(status="204 No Content", framing="", body=b"")),
    Case("204 with a length", request(), answer("Content-Length: 0", status="204 No Content", framing="", body=b"")),
    Case("304", request("/", 'If-None-Match: "x"'), answer('ETag: "x"', status="304 Not Modified", framing="", body=b"")),
    Case("304 with a length", request("/", 'If-None-Match: "x"'), answer('ETag: "x"', "Content-Length: 500", status="304 Not Modified", framing="", body=b"")),
    Case("205", request(), answer(status="205 Reset Content", body=b"")),
    Case("HEAD, chunked", request(method="HEAD"), answer("Transfer-Encoding: chunked", framing="", body=b"")),
    Case("HEAD, of no length", request(method="HEAD"), answer("Connection: close", framing="", body=b""), then="close"),
    Case("103 before the answer", request(), b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK, hangs=("nginx",)),
    Case("102 before the answer", request(), b"HTTP/1.1 102 Processing\r\n\r\n" + OK, hangs=("nginx",)),
    Case("an unsolicited 100", request(), b"HTTP/1.1 100 Continue\r\n\r\n" + OK, hangs=("nginx",)),
    Case("a redirect with a path", request(), answer("Location: /other?x", status="302 Found")),
    Case("a relative redirect", request("/a/b"), answer("Location: ../other", status="301 Moved")),
    Case("a redirect elsewhere", request(), answer("Location: http://other.test/", status="307 There")),
    Case("a redirect without a scheme", request(), answer("Location: //other.test/", status="308 There")),
    Case("201", post(), answer("Location: /new", status="201 Created")),
    Case("several cookies", request(), answer("Set-Cookie: a=1; Path=/", "Set-Cookie: b=2; Expires=Thu, 01 Jan 2032 00:00:00 GMT", "Set-Cookie: a=1; Path=/")),
    Case("a field twice in the answer", request(), answer("X-A: 1", "X-A: 2", "Vary: a", "Vary: b", "Link: <a>", "Link: <b>")),
    Case("the order of fields in the answer", request(), answer("X-B: 1", "X-A: 2", "X-C: 3", "X-A: 4"), order=True),
    Case("an empty value in the answer", request(), answer("X-A:")),
    Case("bytes beyond ASCII in the answer", request(), answer("X-A: \xe9\xff")),
    Case("a folded line in the answer", request(), answer("X-A: a\r\n b")),
    Case("an underscore in the answer", request(), answer("X_A: 1")),
    Case("a long field in the answer", request(), answer("X-A: " + "a" * 12000)),
    Case("hop-by-hop fields in the answer", request(), answer("Connection: X-Gone", "X-Gone: 1", "Keep-Alive: timeout=5", "Proxy-Connection: x", "Upgrade: h2c", "X-Kept: 1")),
    Case("Connection: close in the answer", request(), answer("Connection: close")),
    Case("407", request(), answer('Proxy-Authenticate: Basic realm="x"', status="407 Who")),
    Case("401", request(), answer('WWW-Authenticate: Basic realm="x"', 'WWW-Authenticate: Digest realm="y"', status="401 Who")),
    Case("gzip", request("/", "Accept-Encoding: gzip"), answer("Content-Encoding: gzip", "Vary: Accept-Encoding", body=b"\x1f\x8b not really")),
    Case("fields that nginx obeys", request(), answer("X-Accel-Expires: 5", "X-Accel-Limit-Rate: 0", "X-Accel-Buffering: no")),
    Case("Alt-Svc and others", request(), answer('Alt-Svc: h3=":443"', "Strict-Transport-Security: max-age=1", "Age: 1", "Via: 1.1 x", "Warning: 199 - x")),
    Case("a reason of one's own", request(), answer(status="299 Something Odd")),
    Case("no reason", request(), answer(status="200 ")),
    Case("no reason and no space", request(), answer(status="200")),
    Case("a status beyond 599", request(), answer(status="799 What")),
    Case("404 without a body", request(), answer(status="404 Not Found", body=b"")),
    Case("500", request(), answer(status="500 Broken")),
    Case("an answer of HTTP/1.0", request(), close_delimited().replace(b"HTTP/1.1", b"HTTP/1.0"), then="close"),
    Case("an answer of HTTP/1.0 with a length", request(), OK.replace(b"HTTP/1.1", b"HTTP/1.0"), then="close"),
    Case("nothing but a status line", request(), b"HTTP/1.1 200 OK\r\nX-Upstream: yes\r\n\r\n", then="close"),
]  # fmt: skip

BROKEN = [
    Case("closed without an answer", post(), b"", then="close"),
    Case("a reset without an answer", post(), b"", then="reset"),
    Case("half a head", post(), b"HTTP/1.1 200 OK\r\nX-Ups", then="close"),
    Case("garbage", post(), b"nonsense\r\n\r\n", then="close"),
    Case("an answer of HTTP/0.9", post(), b"<html>hello</html>\n", then="close"),
    Case("an answer of HTTP/2.0", post(), OK.replace(b"HTTP/1.1", b"HTTP/2.0"), then="close"),
    Case("an answer cut off, of a length", post(), OK.replace(b"Length: 6", b"Length: 60"), then="close", hangs=("node",)),
    Case("an answer cut off, in chunks", post(), answer("Transfer-Encoding: chunked", framing="", body=b"6\r\nanswer\r\n"), then="close", hangs=("node",)),
    Case("an answer cut off behind its head", post(), answer("Content-Length: 60", framing="", body=b""), then="close", hangs=("node",)),
    Case("an answer in chunks cut off behind its head", post(), answer("Transfer-Encoding: chunked", framing="", body=b""), then="close", hangs=("node",)),
    Case("an answer cut off by a reset", post(), OK.replace(b"Length: 6", b"Length: 60"), then="reset", hangs=("node",)),
    Case("two lengths in the answer", post(), answer("Content-Length: 5"), then="close"),
    Case("one length twice in the answer", post(), answer("Content-Length: 6"), then="close"),
    Case("a length and chunks in the answer", post(), answer("Content-Length: 6", framing="chunked"), then="close"),
    Case("a malformed length in the answer", post(), answer("Content-Length: six", framing=""), then="close"),
    Case("a coding that is not chunked in the answer", post(), answer("Transfer-Encoding: gzip", framing=""), then="close", hangs=("node",)),
    Case("a malformed chunk in the answer", post(), answer("Transfer-Encoding: chunked", framing="", body=b"zz\r\nanswer\r\n0\r\n\r\n"), then="close", hangs=("node",)),
    Case("a malformed second chunk in the answer", post(), answer("Transfer-Encoding: chunked", framing="", body=b"6\r\nanswer\r\nzz\r\n"), then="close", hangs=("node",)),
    Case("a chunk longer than it says in the answer", post(), answer("Transfer-Encoding: chunked", framing="", body=b"3\r\nanswer\r\n0\r\n\r\n"), then="close", hangs=("node",)),
    Case("a field without a colon in the answer", post(), answer("nonsense"), then="close"),
    Case("a space before the colon in the answer", post(), answer("X-A : 1"), then="close"),
    Case("a NUL in the answer", post(), answer("X-A: a\0b"), then="close"),
    Case("a CR in the answer", post(), answer("X-A: a\rb"), then="close"),
    Case("more bytes than the length", post(), answer() + b"HTTP/1.1 200 OK\r\nX-Evil: 1\r\nContent-Length: 0\r\n\r\n"),
    Case("a body behind 204", post(), answer(status="204 No Content", framing="", body=b"unwanted"), then="close"),
]  # fmt: skip

VERSIONS = [
    Case("HTTP/1.0", b"GET / HTTP/1.0\r\nHost: example.test\r\n\r\n"),
    Case("HTTP/1.0 without Host", b"GET / HTTP/1.0\r\n\r\n"),
    Case("HTTP/1.0, kept alive", b"GET / HTTP/1.0\r\nHost: example.test\r\nConnection: keep-alive\r\n\r\n"),
    Case("HTTP/1.0, and the answer is chunked", b"GET / HTTP/1.0\r\nHost: example.test\r\n\r\n", answer(framing="chunked")),
    Case("HTTP/1.0, and the answer is cut off", b"GET / HTTP/1.0\r\nHost: example.test\r\n\r\n", answer("Transfer-Encoding: chunked", framing="", body=b"6\r\nanswer\r\n"), then="close", hangs=("node",)),
    Case("HTTP/1.0, kept alive, and the answer is chunked", b"GET / HTTP/1.0\r\nHost: example.test\r\nConnection: keep-alive\r\n\r\n", answer(framing="chunked")),
    Case("HTTP/1.0 with a body", b"POST / HTTP/1.0\r\nHost: example.test\r\nContent-Length: 5\r\n\r\nhello"),
    Case("HTTP/1.0, chunked", b"POST / HTTP/1.0\r\nHost: example.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    Case("HTTP/1.2", b"GET / HTTP/1.2\r\nHost: example.test\r\n\r\n"),
    Case("HTTP/2.0", b"GET / HTTP/2.0\r\nHost: example.test\r\n\r\n"),
    Case("HTTP/0.9", b"GET /\r\n\r\n"),
    Case("http in small letters", b"GET / http/1.1\r\nHost: example.test\r\n\r\n"),
    Case("pipelined", request("/one") + request("/two"), count=2),
    Case("pipelined, with a body first", post(b"hello", target="/one") + request("/two"), count=2),
    Case("pipelined, chunked first", chunked() + request("/two"), count=2),
]  # fmt: skip

CASES = [
    *METHODS,
    *FRAMINGS,
    *FIELDS,
    *TARGETS,
    *HOPS,
    *EXPECTATIONS,
    *UPGRADES,
    *ANSWERS,
    *BROKEN,
    *VERSIONS,
]


@dataclass(frozen=True)
class Difference:
    """Why a peer differs from ours in some cases."""

    name: str
    peers: tuple[str, ...]
    #: what differs, as ``differences()`` calls it
    what: frozenset[str]
    cases: tuple[str, ...]
    why: str
    #: not in every version of the peer, or not each of ``what`` in every case
    sometimes: bool = False


def differ(name: str, peers: str, what: str, why: str, *cases: str, **options: Any) -> Difference:
    return Difference(
        name, tuple(peers.split()), frozenset(part.strip() for part in what.split(",")), cases, why, **options
    )


BROKEN_CHUNKS = (
    "a malformed chunk in the answer", "a malformed second chunk in the answer",
    "a chunk longer than it says in the answer",
)  # fmt: skip

#: What ours has to answer, whatever the others do.
DEMANDED = {
    # nothing was sent to the client yet: a connection that just closes would be taken for a stale one, and
    # the request be sent again
    **dict.fromkeys(BROKEN_CHUNKS, "502"),
    # RFC 9112 section 3.2
    "no Host": "400", "two Hosts": "400", "a Host with a path": "400", "a Host with a user": "400",
    # RFC 9110 section 6.2: the highest version that the server conforms to
    "HTTP/1.2": "HTTP/1.1 200 OK",
}  # fmt: skip

UNREAD = "request framing, request body, request whole, request trailers, request extensions"
REFUSED = "number of requests, status"

DIFFERENCES = [
    # requests
    differ(
        "a chunked body that is there at once", "nginx", "request framing",
        "sent with a length when all of it came with the head; here it stays chunked",
        "chunked", "chunked, several", "chunked, with an extension", "chunked, with a trailer",
        "chunked, with a trailer that was announced", "chunked, of nothing", "GET chunked", "DELETE chunked",
        "OPTIONS chunked", "Chunked in another letter case", "pipelined, chunked first",
        sometimes=True,
    ),
    differ(
        "chunked DELETE and OPTIONS", "node", "request framing, request body, kept",
        "sends Content-Length: 0 and the body behind it, which is a hole for smuggling (RFC 9112 section 6.3)",
        "DELETE chunked", "OPTIONS chunked",
    ),
    differ(
        "a request without a body", "node", "request framing",
        "adds Content-Length: 0 to DELETE, OPTIONS and POST; here nothing is added (RFC 9110 section 8.6 asks the client, not the proxy, to add it to POST)",
        "DELETE", "OPTIONS", "OPTIONS *", "POST without a framing",
    ),
    differ(
        "Max-Forwards", "nginx node", "number of requests, status",
        "hand it on as it is; here OPTIONS and TRACE are counted down, and answered at 0 (RFC 9110 section 7.6.2)",
        "Max-Forwards",
    ),
    differ(
        "trailers", "nginx node", "request trailers, response trailers",
        "drop them; here they are kept (RFC 9110 section 6.5)",
        "chunked, with a trailer", "chunked, with a trailer that was announced", "an answer with a trailer",
    ),
    differ(
        "TE", "nginx node", "request fields, request connection, response connection",
        "nginx drops it and node-http-proxy hands on all of it; here trailers are asked for when the client takes them (RFC 9110 section 10.1.4)",
        "TE", "an answer with a trailer",
    ),
    differ(
        "OPTIONS * of nginx", "nginx", REFUSED,
        "refuses it; here it is the target's to answer (RFC 9110 section 9.3.7)",
        "OPTIONS *",
    ),
    differ(
        "OPTIONS * of node-http-proxy", "node", "request line",
        "asks for /*, which is another resource (RFC 9112 section 3.2.4)",
        "OPTIONS *",
    ),
    differ("TRACE", "nginx", REFUSED, "refuses it; here it is the target's to allow (RFC 9110 section 9.3.8)", "TRACE"),
    differ(
        "CONNECT", "nginx node", "status",
        "400, and a closed connection; here 501: a reverse proxy makes no tunnels (RFC 9110 section 9.3.6)",
        "CONNECT",
    ),
    differ(
        "unknown methods", "node", REFUSED,
        "Node knows a list of methods; here, as in RFC 9110 section 9.1, any token is one",
        "an unknown method",
    ),
    differ(
        "codings other than chunked", "nginx node", REFUSED,
        "nginx says 501 to all, Node lets `gzip, chunked` through; here 501 to a coding and 400 to anything else (RFC 9112 section 6.1)",
        "a coding that is not chunked", "identity as a coding", "a vertical tab before chunked",
        sometimes=True,
    ),
    differ(
        "Transfer-Encoding: CHUNKED", "node", "request framing",
        "hands on the letters of the client; here all framings are written anew (RFC 9112 section 6.1)",
        "Chunked in another letter case",
    ),
    differ(
        "a malformed body", "nginx node", "number of requests",
        "read the first chunk before they send the head; here the head goes up at once, and the target's connection is closed before the body's end (RFC 9112 section 7.1)",
        "a malformed chunk size",
        sometimes=True,
    ),
    differ(
        "repeated headers", "node", "request fields, request order, response fields, response order",
        "joins them to one, and reverses their order upwards; here number and order stay (RFC 9110 section 5.3)",
        "a field twice", "Cookie twice", "the order of fields", "a field twice in the answer",
        "the order of fields in the answer", "401",
    ),
    differ(
        "the letter case of names", "nginx", "request fields, response fields",
        "keeps it; here it is small, as in Node, unless preserve_header_key_case=True (RFC 9110 section 5.1: it has no meaning)",
        "the letter case of names",
    ),
    differ(
        "underscores in names", "node", "request fields",
        "keeps the field; here gunicorn's header_map drops it, as nginx does, for it could pass for one with a hyphen",
        "an underscore in a name",
    ),
    differ(
        "odd names", "nginx", "request fields",
        "drops names with other characters than letters, digits and hyphens; any token is a name (RFC 9110 section 5.6.2)",
        "a dot in a name", "odd characters in a name",
    ),
    differ(
        "malformed headers", "nginx", REFUSED,
        "ignores such a line, or takes it as it is; here 400 (RFC 9110 section 5.5, RFC 9112 section 5)",
        "a control character in a value", "no colon", "a line that ends in LF",
    ),
    differ("a header section that is too long", "nginx node", "status", "the same refusal, by other numbers (RFC 6585 section 5)", "a value that is too long", "a target that is too long", sometimes=True),
    differ(
        "an empty Host", "nginx node", "number of requests, status, request fields",
        "nginx refuses it; Node and the proxy here send the target's name (RFC 9112 section 3.2); only the ports differ",
        "an empty Host",
    ),
    differ(
        "an invalid Host", "nginx node", REFUSED,
        "nginx takes one with a user, Node one with a path; here 400 (RFC 9112 section 3.2)",
        "a Host with a path", "a Host with a user",
        sometimes=True,
    ),
    differ("two Hosts", "node", REFUSED, "takes the first; here 400 (RFC 9112 section 3.2)", "two Hosts"),
    differ(
        "two slashes in a path", "node", "request line",
        "makes one of them; here a path is sent as it came", "target //double//slash",
    ),
    differ(
        "quotes and backslashes in a path", "node", "request line",
        "rewrites ' to %27 and \\ to /; here a path is sent as it came",
        "target /~user/!$&'()*+,=:@", "target /a\\b",
    ),
    differ(
        "paths that cannot be decoded", "nginx", REFUSED,
        "decodes each path, and refuses what leads above the root, %00 and a bare %; here the target judges, to which the path is sent as it came (RFC 3986 section 6)",
        "target /../up", "target /%zz", "target /%", "target /%00",
    ),
    differ(
        "a fragment", "nginx", "request line",
        "sends it; here, as in Node, it is cut off, for a request target has none (RFC 9112 section 3.2)",
        "target /a#fragment",
    ),
    differ(
        "bytes beyond ASCII in a target", "nginx", REFUSED,
        "sends them; here 400, as in Node (RFC 3986 section 2.1)", "target /\xc3\xa9?\xc3\xa9",
    ),
    differ(
        "an absolute target of another host", "nginx node", "request fields",
        "go by the field Host; the target has precedence (RFC 9112 section 3.2.2)",
        "an absolute target of another host",
        sometimes=True,
    ),
    differ(
        "an absolute target with a user", "node", REFUSED,
        "hands the request on; here, as in nginx, 400 (RFC 9110 section 4.2.4)", "an absolute target with a user",
    ),
    differ(
        "headers that Connection names", "nginx node", "request fields, request connection, response connection",
        "hand them on, node-http-proxy with the Connection field, and even in the answer; here they end, but for Host and X-Forwarded-* (RFC 9110 section 7.6.1)",
        "Connection names a field", "Connection names what is for the other end", "Connection names Host",
        "HTTP2-Settings",
        sometimes=True,
    ),
    differ(
        "Keep-Alive", "node", "request fields", "hands it on; it is for one connection (RFC 9110 section 7.6.1)", "Keep-Alive",
    ),
    differ(
        "Proxy-Authorization and Proxy-Connection", "nginx node", "request fields",
        "hand them on; they are for this proxy (RFC 9110 section 11.7.2, RFC 9110 section 7.6.1)",
        "Proxy-Authorization", "Proxy-Connection",
    ),
    differ(
        "Proxy", "nginx node", "request fields",
        "hand it on; a CGI program would take it for its HTTP_PROXY (RFC 3875 section 4.1.18), so it ends here",
        "Proxy",
    ),
    differ(
        "Upgrade that Connection does not name", "nginx node", "request fields, request connection",
        "nginx makes an upgrade of it, node-http-proxy hands it on; here it ends (RFC 9110 section 7.8)",
        "Upgrade that Connection does not name",
    ),
    differ(
        "a WebSocket request with a body", "nginx", REFUSED,
        "hands it on; here 400, for a target that ignores the body takes it for another request (RFC 6455 section 4.1)",
        "an upgrade with POST",
    ),
    differ(
        "Expect: 100-continue of nginx", "nginx", f"interim, request fields, kept, {UNREAD}",
        "answers it by itself, and the target is not asked (RFC 9110 section 10.1.1)",
        "Expect: 100-continue", "Expect: 100-continue, with the body behind it", "Expect: 100-continue, refused",
    ),
    differ(
        "Expect: 100-continue of Node", "node", "interim",
        "Node's server says 100 before the target was asked (RFC 9110 section 10.1.1)",
        "Expect: 100-continue, refused",
    ),
    differ(
        "other expectations", "nginx node", f"{REFUSED}, kept",
        "nginx ignores them; Node says 417, too, and reads the body to keep the connection (RFC 9110 section 10.1.1)",
        "Expect: something else",
    ),
    # upgrades
    differ(
        "other protocols than WebSocket", "node", REFUSED,
        "closes the connection; here any protocol may be switched to (RFC 9110 section 7.8)",
        "an upgrade to another protocol", "an upgrade to one of two protocols", "an upgrade with POST",
    ),
    differ(
        "an upgrade that is refused", "node", "kept",
        "closes the connection after the answer; here it is one like any other (RFC 9110 section 7.8)",
        "an upgrade that is refused", "an upgrade that is refused, kept", "an upgrade that is ignored",
    ),
    differ(
        "an unsolicited switch of protocols", "nginx node", "status",
        "nginx hands the 101 on, node-http-proxy never answers; here 502 (RFC 9110 section 15.2.2)",
        "an unsolicited switch",
    ),
    # answers
    differ(
        "1xx", "nginx node", "interim, kept, status, number of requests",
        "nginx 1.22 takes one for the answer, node-http-proxy drops it; here 102 and 103 are handed on, and a 100 if the client waits for it (RFC 9110 section 15.2)",
        "103 before the answer", "102 before the answer", "an unsolicited 100",
        sometimes=True,
    ),
    differ(
        "204 with a length", "nginx node", "response framing",
        "hand the field on; 204 must have none (RFC 9110 section 8.6)", "204 with a length",
    ),
    differ(
        "HEAD, chunked", "node", "response framing",
        "hands Transfer-Encoding on; here, as in nginx, it is left out, which it may be (RFC 9112 section 6.1)", "HEAD, chunked",
    ),
    differ(
        "the target's connection ends", "node", "kept",
        "closes the client's connection, too, for it hands Connection: close on (RFC 9110 section 7.6.1)",
        "HEAD, of no length", "Connection: close in the answer",
    ),
    differ(
        "hop-by-hop headers of the response", "nginx node", "response fields, response connection",
        "hand on some (nginx) or all (node-http-proxy); here they end (RFC 9110 section 7.6.1)",
        "hop-by-hop fields in the answer",
    ),
    differ(
        "Proxy-Authenticate", "nginx node", "response fields",
        "hand it on; it is for the next client only, which is this proxy (RFC 9110 section 11.7.1)", "407",
    ),
    differ(
        "folded lines in a response", "nginx node", "status",
        "502; here the lines are joined, as a proxy may (RFC 9112 section 5.2)", "a folded line in the answer",
    ),
    differ(
        "X-Accel headers", "nginx", "response fields", "obeys them and keeps them to itself; here they are fields like others",
        "fields that nginx obeys",
    ),
    differ(
        "a missing reason", "nginx node", "response line",
        "Node makes one up, nginx leaves the space out; the space is part of the line (RFC 9112 section 4)",
        "no reason", "no reason and no space", sometimes=True,
    ),
    differ(
        "a response without Date", "nginx", "response fields",
        "hands it on so; here, as in Node, it is added (RFC 9110 section 6.6.1)", "nothing but a status line",
    ),
    differ(
        "an empty response that ends with its connection", "node", "response framing",
        "is given Content-Length: 0; here chunks, for the head does not wait for the body (RFC 9112 section 6.3)", "nothing but a status line",
    ),
    # what is broken
    differ(
        "garbage from the target", "nginx", "status",
        "is handed on as an answer of HTTP/0.9; here 502 (RFC 9112 section 4)",
        "garbage", "an answer of HTTP/0.9",
    ),
    differ(
        "a response of HTTP/2.0", "nginx node", "status",
        "is taken for HTTP/1.1; here 502 (RFC 9110 section 2.5)", "an answer of HTTP/2.0",
    ),
    differ(
        "a truncated response", "node", "response whole, status",
        "the client waits for ever, or gets a 502 when the head came with the reset; here its connection ends before the answer does (RFC 9112 section 8)",
        "an answer cut off, of a length", "an answer cut off, in chunks", "an answer cut off by a reset",
        "an answer cut off behind its head", "an answer in chunks cut off behind its head",
        sometimes=True,
    ),
    differ(
        "malformed chunks", "nginx node", "status, response line, response fields, response body",
        "nginx closes the connection without a word, node-http-proxy puts its 502 on the target's head (and dies, unless the response has a handler of errors); here 502 (RFC 9112 section 7.1)",
        *BROKEN_CHUNKS, sometimes=True,
    ),
    differ(
        "a truncated response, to HTTP/1.0", "nginx node", "response whole, response body",
        "nginx ends the connection in order, node-http-proxy not at all; here it is reset, for to the client an end means a whole answer (RFC 9112 section 8)",
        "HTTP/1.0, and the answer is cut off",
    ),
    differ(
        "responses of two framings", "nginx", "status",
        "takes one of them; here 502 (RFC 9112 section 6.3)",
        "two lengths in the answer", "a length and chunks in the answer", "a malformed length in the answer",
    ),
    differ(
        "one length twice", "node", "status",
        "502; here, as in nginx, it is one (RFC 9110 section 8.6)", "one length twice in the answer",
    ),
    differ(
        "a response of another coding", "nginx node", "status",
        "take it for one that ends with its connection, and node-http-proxy sends no body; here 502 (RFC 9112 section 6.1)",
        "a coding that is not chunked in the answer",
    ),
    differ(
        "a malformed header of the response", "nginx", "status",
        "is dropped; here 502 (RFC 9112 section 5)", "a field without a colon in the answer",
    ),
    differ(
        "a body after 204", "node", "status",
        "502, with the reason of the 204; here the answer, and the target's connection is not used again (RFC 9112 section 6.3)",
        "a body behind 204",
    ),
    # versions
    differ(
        "the version of the response", "nginx node", "response line",
        "is 1.1; here it is the client's, as gunicorn has it (RFC 9110 section 2.5 would have 1.1)",
        "HTTP/1.0", "HTTP/1.0 without Host", "HTTP/1.0, kept alive", "HTTP/1.0, and the answer is chunked",
        "HTTP/1.0, kept alive, and the answer is chunked", "HTTP/1.0 with a body", "HTTP/1.0, and the answer is cut off",
    ),
    differ(
        "HTTP/1.0 without Host", "nginx node", "request fields",
        "nginx sends none, Node and the proxy here the target's name (RFC 9112 section 3.2); only the ports differ",
        "HTTP/1.0 without Host",
    ),
    differ(
        "chunks of HTTP/1.0", "node", REFUSED, "are accepted; here 400: such a framing is faulty (RFC 9112 section 6.1)",
        "HTTP/1.0, chunked",
    ),
    differ(
        "HTTP/1.2", "node", f"{REFUSED}, response line", "is refused; a later minor version is to be taken for 1.1 (RFC 9110 section 2.5)", "HTTP/1.2",
    ),
    differ(
        "HTTP/2.0", "nginx node", REFUSED,
        "nginx says 505, Node answers; here 400, as gunicorn has it (RFC 9110 section 15.6.6)", "HTTP/2.0",
    ),
    differ(
        "HTTP/0.9", "nginx node", REFUSED, "is carried; here 400 (RFC 9112 section 3)", "HTTP/0.9",
    ),
]  # fmt: skip
