"""The requests that are compared with gunicorn's own gevent worker (CASES), and those that are refused (BAD).

A case is what a client sends, byte for byte. What a case is about is its name. The application is named by the
header X-App (programs/http_echo.py).
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """What a client sends, and what is compared of the answers."""

    name: str
    data: bytes
    #: the answers (by number) that have no body because the method was HEAD
    heads: tuple[int, ...] = ()
    #: the client sends no more than this, and says so
    eof: bool = False
    #: what the Connection field says is not compared, only what happens
    loose: bool = False
    #: the status of a refusal
    status: int = 0
    #: the settings of the servers that it is sent to
    group: str = "default"


def message(line: str, *fields: str, body: bytes | str = b"") -> bytes:
    """A head of these lines, and what follows it."""
    if isinstance(body, str):
        body = body.encode("latin-1")
    return "".join(f"{text}\r\n" for text in (line, *fields, "")).encode("latin-1") + body


def get(target: str, *fields: str) -> bytes:
    return message(f"GET {target} HTTP/1.1", "Host: a.test", *fields)


def post(*fields: str, body: bytes | str = b"", target: str = "/post") -> bytes:
    return message(f"POST {target} HTTP/1.1", "Host: a.test", *fields, body=body)


def chunked(body: bytes | str, *fields: str) -> bytes:
    """A request with a chunked body, which is spelled out."""
    return post("Transfer-Encoding: chunked", *fields, body=body)


def sized(body: bytes | str, *fields: str) -> bytes:
    return post(f"Content-Length: {len(body)}", *fields, body=body)


def runs(application: str, *fields: str, method: str = "GET", version: str = "1.1") -> bytes:
    return message(f"{method} /run HTTP/{version}", "Host: a.test", f"X-App: {application}", *fields)


#: Comes after a case, on the same connection: is it answered?
PROBE = message("GET /probe HTTP/1.1", "Host: probe", "Connection: close")

TWO_CHUNKS = "3\r\nabc\r\n5\r\ndefgh\r\n0\r\n\r\n"
LINES = b"first line\nsecond\n\nfourth\r\nno end"
LINES_CHUNKED = (
    b"8\r\nfirst li\r\n3\r\nne\n\r\n7\r\nsecond\n\r\n1\r\n\n\r\ne\r\nfourth\r\nno end\r\n0\r\n\r\n"
)


def cases(group: str, table: dict[str, Any]) -> list[Case]:
    """A table of name -> bytes, or (bytes, options)."""
    found = []
    for name, value in table.items():
        data, options = value if isinstance(value, tuple) else (value, {})
        found.append(Case(name, data, group=group, **options))
    return found


def _lines(prefix: str, lines: Iterable[str]) -> dict[str, bytes]:
    """One request for each request line."""
    return {f"{prefix} {line!r}": message(line, "Host: a.test") for line in lines}


def _fields(prefix: str, rows: Iterable[str | tuple[str, ...]]) -> dict[str, bytes]:
    """One request for each set of fields."""
    table = {}
    for row in rows:
        fields = (row,) if isinstance(row, str) else row
        table[f"{prefix} {' | '.join(fields)[:150]!r}"] = message("GET /fields HTTP/1.1", *fields)
    return table


REQUEST_LINES = _lines("line", [
    "GET / HTTP/1.1", "GET / HTTP/1.0", "GET / HTTP/1.2", "GET / HTTP/1.9", "OPTIONS * HTTP/1.1",
    "OPTIONS * HTTP/1.0", "OPTIONS / HTTP/1.1", "CONNECT b.test:443 HTTP/1.1", "CONNECT [::1]:443 HTTP/1.1",
    "CONNECT /path HTTP/1.1", "CONNECT b.test HTTP/1.1", "DELETE /a HTTP/1.1", "PATCH /a HTTP/1.1", "-GET / HTTP/1.1",
    "M-SEARCH /a HTTP/1.1", "VERSION-CONTROL /a HTTP/1.1", "A1$&'*+.^_`|~! / HTTP/1.1", "ABC / HTTP/1.1",
    "ABCDEFGHIJKLMNOPQRST / HTTP/1.1", "PRI / HTTP/1.1", "TRACE / HTTP/1.1",
    "GET /http://b.test/x HTTP/1.1",
    "GET /%20a%2Fb%00c%ff%FFd%C3%A9 HTTP/1.1", "GET /%2e%2e/./../a HTTP/1.1", "GET /100% HTTP/1.1", "GET /%zz%4 HTTP/1.1",
    "GET //double//slash/ HTTP/1.1", "GET ///three HTTP/1.1", "GET //b.test/x?y=//z HTTP/1.1", "GET // HTTP/1.1",
    "GET /a?b=c HTTP/1.1", "GET /a? HTTP/1.1", "GET /? HTTP/1.1", "GET /a?b?c HTTP/1.1", "GET /a?b=%20%2F+%00&c#d HTTP/1.1",
    "GET /a#b?c HTTP/1.1", "GET /a# HTTP/1.1", "GET /# HTTP/1.1", "GET /a?b#c#d HTTP/1.1", "GET /a;p=1;q/b;r HTTP/1.1",
    "GET /a;p?b HTTP/1.1", "GET /:80 HTTP/1.1", "GET /a:b HTTP/1.1", "GET /[a] HTTP/1.1", "GET //[a HTTP/1.1", "GET //[::1]/x HTTP/1.1",
    "GET /\"quoted\"?x=\"y\" HTTP/1.1", "GET /<>\\^`{|} HTTP/1.1", "GET /a@b HTTP/1.1", "GET /~user/!$&'()*+,;= HTTP/1.1",
    "HEAD / HTTP/1.0",
])  # fmt: skip

FIELDS = _fields("fields", [
    (), "Host: a.test", "Host: a.test:81", "Host: [::1]:81", "Host: [::1]", "Host:", "Host: a.test:", "Host: a b",
    "Host: a.test, b.test", "HOST: UPPER.test", "host:tight.test", "Host: a=80", "Host: a.test:x", "Host: /a", "Host: a:1:2",
    ("Host: a.test", "Accept: */*", "User-Agent: client/1.0 (some; thing) other/2"),
    "X:", "X: ", "X:\t", "X: \t a \t b \t ", "X:a:b: c", "X: a,b, c", "aaaa:++++", "X: caf\xe9", "X: \x80\xff", "X: caf\xc3\xa9",
    "X: \xa0nbsp\xa0", "X: \x85nel\x85", "X: tab\tinside", "X: a\"b\\c", "!#$%&'*+-.^`|~9aZ: token", "X.Dot|Pipe: a", "9: a",
    ("X-A: 1", "X-A: 2", "x-a: 3"), ("X-A:", "X-A: 2"), ("X-A: 1", "X-A:"), ("X-A:", "X-A:"), ("X-A: 1", "X.A: 2"), ("X-A: 1", "X-B: 2", "X-A: 3"),
    ("If-Match: \"a\"", "If-Match: \"b\""), ("Cookie: a=1", "Cookie: b=2"), ("Accept: a", "Accept: b"),
    ("Authorization: a", "Authorization: b"), ("Referer: a", "Referer: b"),
    "X_A: underscore", ("X-A: 1", "X_A: 2"), ("X_A: 1", "X-A: 2"), ("X-Forwarded-For: 192.0.2.1", "X_Forwarded_For: 192.0.2.2"),
    ("X_Forwarded_For: 192.0.2.2", "X-Forwarded-For: 192.0.2.1"), "Content_Length: 5", "Transfer_Encoding: chunked", "_: a",
    ("Content_Type: a/b", "Content-Type: c/d"), "Content-Type: text/plain; charset=utf-8", "Content-Type:", "CONTENT-TYPE: A/B",
    "Content-Type : a", "X-Forwarded-For: 192.0.2.1, 192.0.2.2", "Forwarded: for=192.0.2.1;proto=https", "X-Real-IP: 192.0.2.1",
    "Remote-Addr: 192.0.2.1", "X-Forwarded-Host: b.test", "X-Forwarded-Port: 99", "Proxy: http://b.test", "Proxy-Connection: keep-alive",
    "Upgrade: h2c", ("Upgrade: websocket", "Connection: Upgrade"), ("HTTP2-Settings: AAMAAABk", "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings"),
    "Keep-Alive: 300", "TE: trailers", "Trailer: X-A", "Date: x", "Server: x", "Range: bytes=0-1", "Accept-Encoding: gzip",
    ("SCRIPT_NAME: /fie", ), "SCRIPT_NAME: /fields", "SCRIPT_NAME: /other", "SCRIPT_NAME:", ("SCRIPT_NAME: /f", "SCRIPT_NAME: /fields"), "Script-Name: /fields",
    "PATH_INFO: /other", "PATH-INFO: /other", "REMOTE_USER: me", "REMOTE_ADDR: 192.0.2.9", "SCRIPT_NAME : /fields", "WSGI.URL_SCHEME: https",
    ("Host: a.test", "Host: a.test"), ("Content-Type: a/b", "Content-Type: a/b"), ("Host: a.test", "HOST : a"),
    "X: " + "v" * 4000, "X: " + "v" * (8190 - 5), "N" * 3000 + ": v", ("X: " + "v" * 5000, "Y: " + "w" * 8000),
    tuple(f"X-{i}: {i}" for i in range(100)), (*(f"X_{i}: {i}" for i in range(150)), "X-A: 1"), tuple(f"X: {i}" for i in range(100)),
])  # fmt: skip

SCHEME_FIELDS = {
    "X-Forwarded-Protocol": ("", "ssl", "http"),
    "X-Forwarded-Proto": ("", "https", "http"),
    "X-Forwarded-Ssl": ("", "on", "off"),
}
SCHEMES = _fields("scheme", [
    *(
        ("Host: a.test", *(f"{name}: {value}" for name, value in zip(SCHEME_FIELDS, row, strict=True) if value))
        for row in itertools.product(*SCHEME_FIELDS.values())
    ),
    "X-Forwarded-Proto: HTTPS", "X-Forwarded-Proto: https,http", "X-Forwarded-Proto: https, https", "X-Forwarded-Proto:", "x-forwarded-proto: https",
    ("X-Forwarded-Proto: https", "X-Forwarded-Proto: https"), ("X-Forwarded-Proto: https", "X-Forwarded-Proto: http"),
    ("X-Forwarded-Proto: ", "X-Forwarded-Proto: http"), "X_Forwarded_Proto: https", ("X-Forwarded-Proto: http", "X_Forwarded_Proto: https"),
    ("X-Forwarded-Proto: https", "Host: a.test:8443"), ("Forwarded: proto=https", "Host: b"), "X-Scheme: tls", "X-Url-Scheme: https", "Front-End-Https: on",
])  # fmt: skip

CONNECTIONS = {
    f"connection {version} {' | '.join(values)!r}": message(
        f"GET /c HTTP/{version}", "Host: a.test", *(f"Connection: {value}" for value in values)
    )
    for version in ("1.1", "1.0")
    for values in (
        (), ("close",), ("Close",), ("keep-alive",), ("Keep-Alive",), ("KEEP-ALIVE",), ("",), ("x",), ("upgrade",), (" close\t",),
        ("x, keep-alive",) if version == "1.1" else ("y",), ("closed",), ("keep-alive", "keep-alive"), ("x", "x"),
    )
}  # fmt: skip

BODIES: dict[str, Any] = {
    "no length": post(),
    "length 0": sized(""),
    "length 5": sized("hello"),
    "length 5, GET": message("GET / HTTP/1.1", "Host: a", "Content-Length: 5", body="hello"),
    "length 0, GET": message("GET / HTTP/1.1", "Host: a", "Content-Length: 0"),
    "length 5, HEAD": (message("HEAD / HTTP/1.1", "Content-Length: 5", body="hello"), {"heads": (0,)}),
    "length 5, 1.0": message("PUT / HTTP/1.0", "Content-Length: 5", body="hello"),
    "length 5, 1.0 keep-alive": message(
        "PUT / HTTP/1.0", "Content-Length: 5", "Connection: Keep-Alive", body="hello"
    ),
    "length in odd case": message("PUT / HTTP/1.1", "conTENT-lenGTH:5", body="hello"),
    "length padded": post("Content-Length: \t 5 \t", body="hello"),
    "json body": post("Content-Type: application/json", "Content-Length: 9", body='{"a": 1}\n'),
    "form body": post("Content-Type: application/x-www-form-urlencoded", "Content-Length: 7", body="a=1&b=2"),
    "multipart body": post(
        "Content-Type: multipart/form-data; boundary=xx", "Content-Length: 69",
        body='--xx\r\nContent-Disposition: form-data; name="a"\r\n\r\nvalue\r\n--xx--\r\nrest',
    ),
    "body that looks like a request": sized(b"GET /inner HTTP/1.1\r\nHost: inner\r\n\r\n"),
    "body of 8192": sized(b"x" * 8192),
    "body of 8193": sized(b"x" * 8193),
    "body of 70000": sized(bytes(range(256)) * 274),
    "body shorter than what follows": sized("abc") + get("/second"),
    "get with a line too many": get("/first") + b"\r\n" + get("/second"),
    "two requests": get("/first") + get("/second"),
    "three requests": get("/first") + sized("abc", "X-Case: 2") + get("/third"),
    "chunked and next": chunked(TWO_CHUNKS) + get("/second"),
    "1.0 and next": message("GET /first HTTP/1.0") + get("/second"),
    "1.0 keep-alive and next": message("GET /first HTTP/1.0", "Connection: keep-alive") + get("/second"),
    "1.0 body and next": message("GET /first HTTP/1.0", "Content-Length: 5", body="hello") + get("/second"),
    "close and next": get("/first", "Connection: close") + get("/second"),
    "empty line first": b"\r\n" + get("/"),
    "empty line first, then an overlong line": b"\r\n" + get("/" + "a" * 4094),
    "empty line first, then the longest line": b"\r\n" + get("/" + "a" * (4094 - 14)),
    "empty line between": get("/first") + b"\r\n" + get("/second"),
    "connect and next": message("CONNECT b.test:443 HTTP/1.1", "Host: b.test:443") + get("/second"),
    "head and next": (message("HEAD /first HTTP/1.1") + get("/second"), {"heads": (0,)}),
    "chunks": chunked(TWO_CHUNKS),
    "chunks, GET": message("GET / HTTP/1.1", "Transfer-Encoding: chunked", body=TWO_CHUNKS),
    "no chunk": chunked("0\r\n\r\n"),
    "chunks, zeros": chunked("0003\r\nabc\r\n00000000000000000000005\r\ndefgh\r\n000\r\n\r\n"),
    "chunks, hex": chunked(b"A\r\n0123456789\r\nb\r\n0123456789a\r\n1e\r\n" + b"z" * 30 + b"\r\n0\r\n\r\n"),
    "chunks, one byte each": chunked("".join(f"1\r\n{c}\r\n" for c in "abcdefgh") + "0\r\n\r\n"),
    "chunk with crlf inside": chunked("6\r\na\r\n0\r\n\r\n0\r\n\r\n"),
    "chunk of 20000": chunked(b"4e20\r\n" + b"y" * 20000 + b"\r\n0\r\n\r\n"),
    "chunks, extensions": chunked("3;a\r\nabc\r\n5 ; b=c ;d = \"e ; f\\\"\"; g\r\ndefgh\r\n0;last=1\r\n\r\n"),
    "chunks, extension quoted": chunked('3;a="b c"\r\nabc\r\n0\r\n\r\n'),
    "chunks, extension of words": chunked("3; some; thing=else\r\nabc\r\n0; x; y\r\n\r\n"),
    "chunks, extension with tabs": chunked("3\t;\ta\t=\tb\r\nabc\r\n0\r\n\r\n"),
    "chunks, long extension": chunked("3;" + "a" * 8000 + "\r\nabc\r\n0\r\n\r\n"),
    "chunks, extension obs-text": chunked('3;a="\xe9"\r\nabc\r\n0\r\n\r\n'),
    "trailers": chunked("3\r\nabc\r\n0\r\nX-A: 1\r\nX-B: 2\r\n\r\n"),
    "trailers and next": chunked("3\r\nabc\r\n0\r\nVary: *\r\nContent-Type: a/b\r\n\r\n") + get("/second"),
    "trailers with underscore": chunked("0\r\nX_A: 1\r\n\r\n"),
    "trailers, scheme": chunked("0\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Ssl: off\r\n\r\n"),
    "trailers, expect": chunked("0\r\nExpect: x\r\n\r\n"),
    "trailers, connection": chunked("0\r\nConnection: close\r\n\r\n"),
    "trailers, empty value": chunked("0\r\nX:\r\n\r\n"),
    "coding in odd case": post("transfer-encoding: CHUNKED", body=TWO_CHUNKS),
    "coding padded": post("Transfer-Encoding: \t chunked \t", body=TWO_CHUNKS),
    "coding identity": post("Transfer-Encoding: identity", "Content-Length: 5", body="hello"),
    "coding identity, chunked": post("Transfer-Encoding: identity, chunked", body=TWO_CHUNKS),
    "coding identity | chunked": post(
        "Transfer-Encoding: identity", "Transfer-Encoding: chunked", body=TWO_CHUNKS
    ),
    "coding gzip, chunked": post("Transfer-Encoding: gzip, chunked", body=TWO_CHUNKS),
    "coding gzip,chunked": post("Transfer-Encoding: gzip,chunked", body=TWO_CHUNKS),
    "coding gzip | chunked": post("Transfer-Encoding: gzip", "Transfer-Encoding: chunked", body=TWO_CHUNKS),
    "coding GZIP, Deflate, compress, identity, Chunked": post(
        "Transfer-Encoding: GZIP, Deflate, compress, identity, Chunked", body=TWO_CHUNKS
    ),
    "coding of an underscore, and length": post(
        "Transfer_Encoding: other", "Content-Length: 3", "Content_Length: -1", body="abc"
    ),
    "expect with the body": (
        post("Expect: 100-continue", "Content-Length: 5", body="hello"), {"loose": True}
    ),
    "expect in odd case": (post("Expect: 100-Continue", "Content-Length: 5", body="hello"), {"loose": True}),
    "expect, chunked": (chunked(TWO_CHUNKS, "Expect: 100-continue"), {"loose": True}),
    "expect, 1.0": message("PUT / HTTP/1.0", "Expect: 100-continue", "Content-Length: 5", body="hello"),
    "half-closed after the request": (get("/"), {"eof": True}),
    "half-closed after the body": (sized("hello"), {"eof": True}),
    "nothing": (b"", {"eof": True}),
    "an empty line": (b"\r\n", {"eof": True}),
    "a carriage return": (b"\r", {"eof": True}),
    "half a request line": (b"GET / HT", {"eof": True}),
    "half a head": (b"GET / HTTP/1.0\r\nHost: a.te", {"eof": True}),
    "no end of the head": (b"GET / HTTP/1.1\r\nHost: a.test\r\n", {"eof": True}),
    "a request and half a one": (get("/first") + b"GET /second HTTP/1.1\r\nHos", {"eof": True}),
}  # fmt: skip
BODIES |= {
    f"{name} of {kind}": data
    for name in (
        "ignore", "part", "part line", "read 1", "read 7", "read 100000", "read none", "read all", "read 0", "readline",
        "readline 4", "readline none", "readlines", "readlines 3", "iterate", "mixed", "wrapped", "careful",
    )
    for kind, data in {
        "lines": sized(LINES, f"X-App: {name}"),
        "chunked lines": chunked(LINES_CHUNKED, f"X-App: {name}"),
    }.items()
}  # fmt: skip
BODIES |= {
    f"{name} of nothing": get("/", f"X-App: {name}") for name in ("read 1", "readline", "readlines", "iterate", "careful")
}  # fmt: skip
BODIES |= {
    f"{name} of a large body": sized(b"line of thirty-two characters..\n" * 2000, f"X-App: {name}")
    for name in ("read 7", "readline", "iterate", "readlines")
}

ANSWERS_ALL_WAYS = (
    "chunks", "no chunk", "empty chunks", "exact", "zero", "zero too much", "too much", "204", "204 with body", "304", "304 with length",
    "404", "write", "write length", "late start", "file", "file length", "memory", "memory length",
)  # fmt: skip
ANSWERS_ONE_WAY = (
    "list", "large", "large length", "length abc", "205", "status alone", "status with space", "status obs-text",
    "status crlf", "status two digits", "status word", "status empty", "status bytes", "value crlf", "value lf", "value cr", "value nul",
    "value unicode", "value latin-1", "value padded", "value int", "value bytes", "name crlf", "name colon", "name space", "name empty",
    "name latin-1", "name bytes", "cookies", "own server and date", "hop by hop", "connection close", "connection keep-alive", "own chunked",
    "upgrade", "upgrade other", "later part str", "parts none", "headers tuple",     "no start", "no start, no part", "start twice", "start again late", "raise", "raise started", "raise first part", "raise later",
    "raise later length", "raise in close", "oserror later", "stop iteration later", "hints", "hints crlf", "hints name crlf",
    "file part", "file offset", "file offset length", "file empty length", "file large", "memory part", "memory offset",
    "memory offset length", "memory empty", "memory empty length", "memory large",
)  # fmt: skip
ANSWERS: dict[str, Any] = {}
for _name in ANSWERS_ALL_WAYS:
    ANSWERS[f"answer {_name}"] = runs(_name)
    ANSWERS[f"answer {_name}, 1.0"] = runs(_name, version="1.0")
    ANSWERS[f"answer {_name}, 1.0 keep-alive"] = runs(_name, "Connection: keep-alive", version="1.0")
    ANSWERS[f"answer {_name}, close"] = runs(_name, "Connection: close")
    ANSWERS[f"answer {_name}, HEAD"] = (runs(_name, method="HEAD"), {"heads": (0,)})
for _name in ANSWERS_ONE_WAY:
    ANSWERS[f"answer {_name}"] = runs(_name)
ANSWERS |= {
    f"answer {name}, 1.0": runs(name, version="1.0") for name in ("hints", "raise later", "large", "file offset", "own chunked")
} | {
    "answer raise, HEAD": (runs("raise", method="HEAD"), {}),  # gunicorn's error page has a body all the same
    "answers in order": b"".join(runs(name) for name in ("chunks", "exact", "file", "204", "write", "304", "memory")),
    "answer to each kind of body": sized("abc", "X-App: chunks") + chunked(TWO_CHUNKS, "X-App: exact") + runs("file"),
}  # fmt: skip

LENIENT: dict[str, Any] = {
    "space before the colon": get("/", "X-A : 1", "X-B\t: 2", "X-C \t : 3"),
    "length with space before the colon": post("Content-Length : 5", body="hello"),
    "coding with space before the colon": post("Transfer-Encoding\t: chunked", body=TWO_CHUNKS),
    "space before the name": get("/", "X-A: 1") .replace(b"Host", b" Host"),
    "only spaces for a name": get("/", "X-A: 1", ": 2"),
    "fold": get("/", "X-A: one", " two", "X-B: 3"),
    "fold with tabs and spaces": get("/", "X-A: one \t", "\t two\t", "   three", "X-B: 3"),
    "fold after nothing": get("/", "X-A:", " one"),
    "fold of nothing": get("/", "X-A: one", " ", "\t", "X-B: 2"),
    "fold first": message("GET / HTTP/1.1", " X-A: 1", "Host: a"),
    "fold with a colon": get("/", "X-A: one", " X-B: two"),
    "fold of a length": post("Content-Length:", " 5", body="hello"),
    "fold of lengths": post("Content-Length: 5", " 5", body="hello"),
    "fold of a coding": post("Transfer-Encoding:", " chunked", body=TWO_CHUNKS),
    "fold with NUL": get("/", "X-A: one", " t\0wo"),
    "fold of a certificate": get("/", "X-Cert: ---BEGIN", *["\t" + "Abc+/012" * 8] * 25, "\t---END", "X-B: 2"),
    "fold too long": get("/", "X-Cert: ---BEGIN", *["\t" + "Abc+/012" * 8] * 31, "\t---END", "X-B: 2"),
    "fold too long in the end": get("/", "X-A: " + "v" * 1985, " 12345678"),
    "fold as long as may be": get("/", "X-A: " + "v" * 1980, " 12345678"),
    "value too long": get("/", "X-A: " + "v" * 1994),
    "value as long as may be": get("/", "X-A: " + "v" * 1993),
    "dangerous length": post("Content-Length: 3", "Content_Length: -1", body="abc"),
    "dangerous coding": post("Transfer_Encoding: other", "Content-Length: 3", body="abc"),
    "dangerous fields": get("/", "X-A: 1", "X_A: 2", "_: 3", "SCRIPT_NAME: /", "Content_Type: a/b"),
    "dangerous path": get("/a/b", "SCRIPT_NAME: /a", "PATH_INFO: /x", "REMOTE_USER: me"),
    "trailers folded": chunked("0\r\nX-A: 1\r\n 2\r\n\r\n"),
    "trailers with space before the colon": chunked("0\r\nX-A : 1\r\nHost : a\r\n\r\n"),
} | _lines("lenient line", [
    "get / HTTP/1.1", "-get / HTTP/1.1", "G / HTTP/1.1", "GE / HTTP/1.1", "A" * 21 + " / HTTP/1.1", "G#T / HTTP/1.1", "head / HTTP/1.1",
    "GET / HTTP/2.0", "GET / HTTP/0.9", "GET / HTTP/3.7", "GET / HTTP/0.0", "GET / HTTP/1.1x", "GET / HTTP/10.1", "GE(T / HTTP/1.1", " / HTTP/1.1",
    "options * HTTP/1.1", "connect a:1 HTTP/1.1",
])  # fmt: skip

CASEFOLD: dict[str, Any] = {
    "underscore refused": get("/", "X_A: 1"),
    "coding of an underscore refused": post("Transfer_Encoding: gzip", "Transfer-Encoding: chunked", body=TWO_CHUNKS),
    "length of an underscore refused": post("Content_Length: 3", "Content-Length: 3", body="abc"),
    "forwarder field not refused": get("/a/b", "SCRIPT_NAME: /a"),
    "trailer underscore refused": chunked("0\r\nX_A: 1\r\n\r\n"),
    "trailer forwarder field refused": chunked("0\r\nSCRIPT_NAME: /\r\n\r\n"),
    "casefold head": (message("head / HTTP/1.1"), {"heads": (0,)}),
} | _lines("casefold line", [
    "get / HTTP/1.1", "Post / HTTP/1.1", "-blah / HTTP/1.1", "g / HTTP/1.1", "options * HTTP/1.1", "Options * HTTP/1.1", "Connect a:1 HTTP/1.1",
    "g\xdft / HTTP/1.1",
])  # fmt: skip

LIMITS: dict[str, Any] = {
    "line of 60": get("/" + "a" * (60 - 14)),
    "line of 61": get("/" + "a" * (61 - 14)),
    "line of 62": get("/" + "a" * (62 - 14)),
    "line of 63": get("/" + "a" * (63 - 14)),
    "line of 600": get("/" + "a" * 600),
    "field of 39": get("/", "X: " + "v" * 34),
    "field of 40": get("/", "X: " + "v" * 35),
    "field of 41": get("/", "X: " + "v" * 36),
    "field of 400": get("/", "X: " + "v" * 400),
    "four fields": get("/", "A: 1", "B: 2", "C: 3"),
    "five fields": get("/", "A: 1", "B: 2", "C: 3", "D: 4"),
    "dropped fields do not count": get("/", "A_: 1", "A_: 2", "A_: 3", "A_: 4", "B: 2", "C: 3"),
    "five fields, one bad": get("/", "A: 1", "B: 2", "C: 3", "D 4"),
    "four long fields": message("GET / HTTP/1.1", *[f"{n}: {'v' * 35}" for n in "ABCD"]),
    "trailer of 40": chunked("0\r\nX: " + "v" * 35 + "\r\n\r\n"),
    "trailer of 41": chunked("0\r\nX: " + "v" * 36 + "\r\n\r\n"),
    "four trailers": chunked("0\r\nA: 1\r\nB: 2\r\nC: 3\r\nD: 4\r\n\r\n"),
    "five trailers": chunked("0\r\nA: 1\r\nB: 2\r\nC: 3\r\nD: 4\r\nE: 5\r\n\r\n"),
    "extension of 30": chunked("3;" + "a" * 30 + "\r\nabc\r\n0\r\n\r\n"),
}  # fmt: skip

UNLIMITED: dict[str, Any] = {
    "line of 8190": get("/" + "a" * (8190 - 14)),
    "line of 8191": get("/" + "a" * (8191 - 14)),
    "line of 50000": get("/" + "a" * 50000),
    "query of 50000": get("/?" + "a" * 50000),
    "field of 20000": get("/", "X: " + "v" * (20000 - 5)),
    "field of 20001": get("/", "X: " + "v" * (20001 - 5)),
    "300 fields": get("/", *(f"X-{i}: {i}" for i in range(300))),
    "1000 equal fields": get("/", *(f"X: {i}" for i in range(1000))),
}

FORWARDER: dict[str, Any] = {
    "environment's script name": get("/base/a"),
    "environment's script name alone": get("/base"),
    "environment's script name and more": get("/based"),
    "environment's script name not matched": get("/other"),
    "script name field": get("/field/a", "SCRIPT_NAME: /field"),
    "script name field and environment's": get("/base/field/a", "SCRIPT_NAME: /base/field"),
    "script name field not matched": get("/base/a", "SCRIPT_NAME: /field"),
    "script name field empty": get("/base/a", "SCRIPT_NAME:"),
    "script name of the root": get("/base/a", "SCRIPT_NAME: /"),
    "script name with escapes": get("/b%61se/a", "SCRIPT_NAME: /b%61se"),
    "script name and escapes": get("/b%61se/a"),
    "script name and double slash": get("//base/a"),
    "script name and absolute-form": get("http://a.test/base/a?b"),
    "script name and asterisk": message("OPTIONS * HTTP/1.1", "Host: a.test"),
    "script name and authority": message("CONNECT a.test:1 HTTP/1.1", "Host: a.test"),
    "any underscore": get(
        "/base/", "X_Real_IP: 192.0.2.1", "X-Real-IP: 192.0.2.2", "A_B: 1", "REMOTE_USER: me"
    ),
    "own scheme field": get("/base/", "X-Scheme: tls"),
    "own scheme field, other value": get("/base/", "X-Scheme: plain"),
    "own scheme fields at odds": get("/base/", "X-Scheme: tls", "X_Secure: 0"),
    "own scheme fields at one": get("/base/", "X-Scheme: tls", "X_Secure: 1"),
    "usual scheme field has no meaning": get("/base/", "X-Forwarded-Proto: https"),
    "own scheme field without host": message("GET /base HTTP/1.1", "X-Scheme: tls"),
    "own scheme field and host": message("GET /base HTTP/1.1", "X-Scheme: tls", "Host: a.test:8443"),
}

FORWARDING: dict[str, Any] = SCHEMES | _fields("forwarding", [
    "X_Real_IP: 192.0.2.1", ("X_REAL_IP: 192.0.2.1", "X-Real-IP: 192.0.2.2"), "SCRIPT_NAME: /fie", "PATH_INFO: /x", "X_Other: 1",
    "X-Forwarded-For: 192.0.2.1", ("X-Forwarded-Proto: https", "X-Forwarded-Ssl: off"),
])  # fmt: skip

ONE_REQUEST: dict[str, Any] = {
    "alone": get("/"),
    "two": get("/first") + get("/second"),
    "keep-alive": get("/", "Connection: keep-alive"),
    "keep-alive 1.0": message("GET / HTTP/1.0", "Connection: keep-alive"),
    "body": sized("hello"),
    "chunks": chunked(TWO_CHUNKS),
    "file": runs("file"),
    "body not read": sized("hello", "X-App: ignore"),
    "no content": runs("204"),
}


def _bad(status: int, table: dict[str, bytes], group: str = "default") -> list[Case]:
    return [Case(f"bad {name}", data, status=status, group=group) for name, data in table.items()]


def _bad_lines(*lines: str) -> dict[str, bytes]:
    return {f"request line {line[:40]!r}": message(line, "Host: a.test") for line in lines}


def _bad_fields(*rows: str | tuple[str, ...]) -> dict[str, bytes]:
    table = {}
    for row in rows:
        fields = (row,) if isinstance(row, str) else row
        table[f"fields {' | '.join(fields)[:80]!r}"] = message("POST / HTTP/1.1", *fields)
    return table


def _bad_chunks(**bodies: str) -> dict[str, bytes]:
    return {name.replace("_", " "): chunked(body) for name, body in bodies.items()}


_HEAD = b"POST / HTTP/1.1\r\nHost: a.test\r\n"

BAD: list[Case] = [
    *_bad(400, _bad_lines(
        "GET", "GET /", "GET HTTP/1.1", "/ HTTP/1.1", "GET  / HTTP/1.1", "GET /  HTTP/1.1", "GET / HTTP/1.1 ", " GET / HTTP/1.1",
        "GET\t/\tHTTP/1.1", "GET /a b HTTP/1.1", "GET / HTTP/1.1 x", "GET  HTTP/1.1", "\x00", "\xff\xfe", "\x16\x03\x01\x02\x00\x01",
        "get / HTTP/1.1", "GeT / HTTP/1.1", "G / HTTP/1.1", "GE / HTTP/1.1", "ABCDEFGHIJKLMNOPQRSTU / HTTP/1.1", "GET: / HTTP/1.1",
        "a:b / HTTP/1.1", "-ab / HTTP/1.1", "G#T / HTTP/1.1", "G\x00T / HTTP/1.1", "GET\x00 / HTTP/1.1", "GET\xdf / HTTP/1.1", "GET\xff / HTTP/1.1",
        "G(T) / HTTP/1.1", "GET\"/ / HTTP/1.1", "GET, / HTTP/1.1", "GET\r / HTTP/1.1", "G\rET / HTTP/1.1",
        "GET / HTTP/2.0", "GET / HTTP/3.0", "GET / HTTP/0.9", "GET / HTTP/0.99", "GET / HTTP/1", "GET / HTTP/1.", "GET / HTTP/.1", "GET / HTTP/11",
        "GET / HTTP/111", "GET / HTTP/1.10", "GET / HTTP/01.1", "GET / http/1.1", "GET / HTTP 1.1", "GET / HTTP/1,1", "GET / HTTPS/1.1", "GET / FTP/1.1",
        "GET / HTTP/x.y", "GET / HTTP/-1.1", "GET / HTTP/1.1\x00", "GET / HTTP/1.1\t", "GET / HTTP/1.\xb9", "GET / HTTP/" + "1" * 60 + ".1",
        "GET a HTTP/1.1", "GET a/b HTTP/1.1", "GET ../a HTTP/1.1", "GET ?a HTTP/1.1", "GET a.test:443 HTTP/1.1", "GET a.test HTTP/1.1", "GET * HTTP/1.1",
        "POST * HTTP/1.1", "OPTIONS ** HTTP/1.1", "GET #a HTTP/1.1", "PUT s://]a/: HTTP/1.1", "GET http://[::1/a HTTP/1.1", "CONNECT  HTTP/1.1",
        "GET /\x00 HTTP/1.1", "GET /\x01 HTTP/1.1", "GET /\x7f HTTP/1.1", "GET /caf\xe9 HTTP/1.1", "GET /\xc3\xa9 HTTP/1.1", "GET /a\tb HTTP/1.1",
        "GET /a\rb HTTP/1.1", "GET /\x0b HTTP/1.1", "GET / HTTP/1.1\r", "PRI * HTTP/2.0",
    )),
    *_bad(400, {
        "bare LF in the request line": b"GET / HTTP/1.1\nHost: a.test\r\n\r\n",
        "bare LF everywhere": b"GET / HTTP/1.1\nHost: a.test\n\n",
        "bare LF in the target": b"GET /a\nb HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "LF for spaces": b"GET\n/\nHTTP/1.1\r\nHost: a.test\r\n\r\n",
        "LF first": b"\nGET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "two empty lines first": b"\r\n\r\nGET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "CR first": b"\rGET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "CR CR LF first": b"\r\r\nGET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "CR CR LF after the request line": b"GET / HTTP/1.1\r\r\nHost: a.test\r\n\r\n",
        "bare LF at the end of a field": b"GET / HTTP/1.1\r\nHost: a.test\nX: 1\r\n\r\n",
        "bare LF at the end of the head": b"GET / HTTP/1.1\r\nHost: a.test\n\n",
        "bare LF for the empty line": b"GET / HTTP/1.1\r\nHost: a.test\r\n\n",
        "bare LF for the empty line without fields": b"GET / HTTP/1.1\r\n\n",
        "bare LF in a name": b"GET / HTTP/1.1\r\nHo\nst: a.test\r\n\r\n",
        "bare CR in a value": b"GET / HTTP/1.1\r\nHost: a.test\rX: 1\r\n\r\n",
        "bare CR in a name": b"GET / HTTP/1.1\r\nHo\rst: a.test\r\n\r\n",
        "CR CR LF at the end of a field": b"GET / HTTP/1.1\r\nHost: a.test\r\r\n\r\n",
        "bare CR for a line": b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\r\n\r\n",
        "a request in a value": b"GET / HTTP/1.1\r\nHost: a\r\nX: b\nContent-Length: 26\r\nGET / HTTP/1.1\nHost: a\r\n\r\n",
        "space before the colon": get("/", "X-A : 1"),
        "tab before the colon": get("/", "X-A\t: 1"),
        "space before the first name": message("GET / HTTP/1.1", " Host: a.test"),
        "tab before the first name": message("GET / HTTP/1.1", "\tHost: a.test"),
        "a first line of spaces": message("GET / HTTP/1.1", "  ", "Host: a.test"),
        "a line of spaces": get("/", "X: 1", "  ", "Y: 2"),
        "a last line of spaces": get("/", "X: 1", "\t"),
        "folded value": get("/", "X: 1", " 2"),
        "folded value with a tab": get("/", "X: 1", "\t2"),
        "folded length": post("Content-Length:", " 5", body="hello"),
    }),
    *_bad(400, _bad_fields(
        "nothing", ": 1", " : 1", "X Y: 1", "X(Y): 1", "X@Y: 1", "X/Y: 1", "[X]: 1", "\"X\": 1", "X\x00Y: 1", "X\x7f: 1", "X\xe9: 1", "X,Y: 1", "X=Y: 1",
        "X: \x00", "X: a\x00b", "X: \x07", "X: a\x01b", "X: \x0b", "X: \x7f", "X: \x1f", "X: \x1b[0m", "Host: \x00",
        ("Host: a.test", "Host: a.test"), ("Host: a.test", "host: b.test"), ("Content-Type: a/b", "Content-Type: c/d"),
        ("X-Forwarded-Proto: https", "X-Forwarded-Ssl: off"), ("X-Forwarded-Proto: https", "X-Forwarded-Proto: http"),
        ("Content-Length\xdf: 3", "Content-Length: 3"), ("Content-Length\xff: 3", "Content-Length: 3"),
    )),
    *_bad(400, _bad_fields(*(
        f"Content-Length: {value}" for value in (
            "+5", "-1", "-0", "0x10", "5, 5", "5,5", "5,", ",5", "5 5", "0 1", "", " ", "5.0", "1e2", "0_1", "1_0", "five", "\xb2", "\xbd", "5;", "'5'",
            "5\t5", "--5", "5-", "NaN", "9" * 5000,
        )
    ))),
    *_bad(400, {
        "lengths that differ": post("Content-Length: 3", "Content-Length: 2", body="abc"),
        "lengths that agree": post("Content-Length: 3", "Content-Length: 3", body="abc"),
        "lengths 0": post("Content-Length: 0", "Content-Length: 0"),
        "length and chunked": post("Content-Length: 3", "Transfer-Encoding: chunked", body="0\r\n\r\n"),
        "chunked and length": post("Transfer-Encoding: chunked", "Content-Length: 3", body="0\r\n\r\n"),
        "chunked and length 0": post("Transfer-Encoding: chunked", "Content-Length: 0", body="0\r\n\r\n"),
        "chunked and a bad length": post("Transfer-Encoding: chunked", "Content-Length: x", body="0\r\n\r\n"),
        "chunked and HTTP/1.0": message("POST / HTTP/1.0", "Transfer-Encoding: chunked", body="0\r\n\r\n"),
        "chunked, HTTP/1.0, keep-alive": message(
            "POST / HTTP/1.0", "Connection: keep-alive", "Transfer-Encoding: chunked", body="0\r\n\r\n"
        ),
    }),
    *_bad(400, _bad_fields(
        "Transfer-Encoding: identity", "Transfer-Encoding: gzip", "Transfer-Encoding: chunked, chunked", "Transfer-Encoding: chunked, gzip",
        "Transfer-Encoding: chunked, identity", "Transfer-Encoding: identity, chunked, identity, chunked", "Transfer-Encoding: \x0bchunked",
        "Transfer-Encoding: chunked\x00", "Transfer-Encoding : chunked", ("Transfer-Encoding: identity", "Content-Length: 5"),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), ("Transfer-Encoding: chunked", "Transfer-Encoding: gzip"),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: identity"), ("Transfer-Encoding: gzip", "Content-Length: 5"),
    )),
    *_bad(501, _bad_fields(
        "Transfer-Encoding: other", "Transfer-Encoding: other, chunked", "Transfer-Encoding: chunked, other", "Transfer-Encoding:",
        "Transfer-Encoding: xchunked", "Transfer-Encoding: x-gzip, chunked", "Transfer-Encoding: chunked;q=1", "Transfer-Encoding: \"chunked\"",
        "Transfer-Encoding: ,chunked", "Transfer-Encoding: chunked,", "Transfer-Encoding: chun ked", "Transfer-Encoding: \xa0chunked",
        "Transfer-Encoding: br, chunked", ("Transfer-Encoding: other", "Content-Length: 5"), "Transfer-Encoding: chunked x",
    )),
    *_bad(417, _bad_fields("Expect: other", "Expect:", "Expect: 100-continue, other", "Expect: 200-ok", "Expect: 100-continue;x")),
    *_bad(417, {"expect, 1.0": message("POST / HTTP/1.0", "Expect: other")}),
    *_bad(400, {f"chunk size {size[:30]}": chunked(f"{size}\r\nabc\r\n0\r\n\r\n") for size in (
        "-3", "+3", "0x3", " 3", "3 ", "\t3", "3\t", "", "g", "3_0", "3.0", "3,3", "3 3", "\xb3", "3\x00", "\x003", "three", ";a", " ;a=b", "3:a", "-0", "3\r",
        "3;a\rb", "3;a\x00", "3;", "3;;a", "3;a=", "3;=a", "3;a b", "3;a=\"b", "3;a=b c", "3;a=\"\x01\"", "3;(", "3;a\x7f", "0x", "x",
    )}),
    *_bad(400, _bad_chunks(
        chunk_longer_than_its_size="3\r\nabcd\r\n0\r\n\r\n", chunk_shorter_than_its_size="5\r\nabc\r\n0\r\n\r\n",
        chunk_without_CRLF="3\r\nabc0\r\n\r\n", chunk_with_bare_LF="3\r\nabc\n0\r\n\r\n", chunk_with_bare_CR="3\r\nabc\r0\r\n\r\n",
        chunk_size_with_bare_LF="3\nabc\r\n0\r\n\r\n", chunk_size_with_bare_LF_and_extension="3\n;\r\nabc\r\n0\r\n\r\n", chunk_sizes_missing="xyz\r\n0\r\n\r\n",
        chunk_size_later="3\r\nabc\r\n3_0\r\ndef\r\n0\r\n\r\n", last_chunk_with_a_space="3\r\nabc\r\n0 \r\n\r\n",
        chunk_size_line_too_long="3;" + "a" * 9000, chunk_size_too_long="0" * 9000,
    )),
    *_bad(400, {f"trailer {text!r}": chunked(f"3\r\nabc\r\n0\r\nX-A: 1\r\n{text}\r\n\r\n") for text in (
        "Content-Length: 9", "Transfer-Encoding: chunked", "Host: b.test", "Trailer: X", "TE: x", "Authorization: x", "content-length: 3", ": x",
        "X : 1", " fold", "X: \x00", "X: a\rb", "X\x00: 1", "GET / HTTP/1.1",
    )}),
    *_bad(400, {
        "trailer without a colon": chunked("3\r\nabc\r\n0\r\nabc\r\n\r\n"),
        "trailer with bare LF": chunked("3\r\nabc\r\n0\r\nX: 1\n\r\n\r\n"),
        "trailers that end with bare LF": chunked("3\r\nabc\r\n0\r\nX: 1\n\n"),
        "last chunk with bare LF": chunked("3\r\nabc\r\n0\r\n\n"),
        "trailer Content-Type twice": chunked("0\r\nContent-Type: a/b\r\nContent-Type: a/b\r\n\r\n"),
    }),
    *_bad(414, {
        "request line of 4095": get("/" + "a" * (4095 - 14)),
        "request line of 9000": get("/" + "a" * 9000),
        "request line without end": b"GET /" + b"a" * 4100,
        "request line without a space": b"G" * 4100,
        "request line of 100000 without end": b"GET /" + b"a" * 100000,
    }),
    *_bad(431, {
        "field of 8191": get("/", "X: " + "v" * (8191 - 5)),
        "field of 20000": get("/", "X: " + "v" * 20000),
        "field name of 9000": get("/", "X" * 9000 + ": v"),
        "101 fields": message("GET / HTTP/1.1", *(f"X-{i}: {i}" for i in range(101))),
        "101 equal fields": message("GET / HTTP/1.1", *["X: 1"] * 101),
        "field without end": _HEAD + b"X: " + b"v" * 900000,
        "fields without end": _HEAD + b"X: 12345678\r\n" * 70000,
        "101 trailers": chunked("0\r\n" + "X: 1\r\n" * 101 + "\r\n"),
        "trailer of 8191": chunked("0\r\nX: " + "v" * (8191 - 5) + "\r\n\r\n"),
        "trailers without end": chunked("0\r\nX: " + "v" * 900000),
    }),
    *_bad(414, {
        "line of 61": get("/" + "a" * (61 - 14)),
        "line without end": b"GET /" + b"a" * 70,
    }, "limits"),
    *_bad(431, {
        "field of 41": get("/", "X: " + "v" * 36),
        "five fields": get("/", "A: 1", "B: 2", "C: 3", "D: 4"),
        "short fields without end": b"GET / HTTP/1.1\r\nHost: a.test\r\nX: " + b"v" * 9000,
        "five trailers": chunked("0\r\nA: 1\r\nB: 2\r\nC: 3\r\nD: 4\r\nE: 5\r\n\r\n"),
    }, "limits"),
    *_bad(400, {
        "underscore": get("/", "X_A: 1"),
        "underscored length": post("Content_Length: 3", "Content-Length: 3", body="abc"),
    }, "casefold"),
    *_bad(500, {"script name": get("/other", "SCRIPT_NAME: /fields")}),
]  # fmt: skip

#: All that is compared, by group; the default's in three parts.
CASES: dict[str, list[Case]] = {
    **{
        f"{group}: refused": [case for case in BAD if case.group == group]
        for group in ("default", "limits", "casefold")
    },
    "default: heads": cases("default", REQUEST_LINES | FIELDS | SCHEMES | CONNECTIONS),
    "default: bodies": cases("default", BODIES),
    "default: answers": cases("default", ANSWERS),
    "lenient": cases("lenient", LENIENT),
    "casefold": cases("casefold", CASEFOLD),
    "limits": cases("limits", LIMITS),
    "unlimited": cases("unlimited", UNLIMITED),
    "untrusted": cases("untrusted", FORWARDING),
    "forwarder": cases("forwarder", FORWARDER),
    "one request": cases("one request", ONE_REQUEST),
}


def selected(table: Iterable[Case]) -> list[Case]:
    """The cases whose name has what HTTP_CASE says in it, when it says something."""
    wanted = os.environ.get("HTTP_CASE", "")
    return [case for case in table if wanted in case.name]


_ids = itertools.count()
_ids_lock = threading.Lock()


def unique(prefix: str) -> str:
    """A request target that no other test uses."""
    with _ids_lock:
        return f"/{prefix}-{os.getpid()}-{next(_ids)}"
