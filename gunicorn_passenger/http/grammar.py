"""The grammar of HTTP messages: each rule once, for requests, responses and what the proxy forwards.

Process: any.
Never: do I/O, or have a rule of its own: each follows a section of an RFC, or says how it is more lenient.

Rules on bytes are named ``..._BYTES``. A pattern is used with ``fullmatch`` unless its comment says
otherwise.
"""

from __future__ import annotations

import re

_TCHAR = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_VCHAR = r"[\t\x20-\x7e\x80-\xff]"
_FIELD_LINE = rf"{_TCHAR}+:{_VCHAR}*"
_STATUS_LINE = rf"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: ({_VCHAR}*))?"
_QUOTED = r'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'


def _bytes(pattern: str) -> re.Pattern[bytes]:
    return re.compile(pattern.encode("ascii"))


#: RFC 9110 section 5.6.2: token = 1*tchar
TOKEN = re.compile(rf"{_TCHAR}+")
#: RFC 9110 section 5.5: the characters of a field value; a reason phrase has the same (RFC 9112 section 4)
FIELD_VALUE = re.compile(rf"{_VCHAR}*")
#: RFC 9112 section 3.2: a request target has visible ASCII characters only
REQUEST_TARGET = re.compile(r"[\x21-\x7e]+")
#: The status of a WSGI response (PEP 3333): status-code [ SP reason-phrase ]
STATUS = re.compile(rf"[0-9]{{3}}(?: {_VCHAR}*)?")
#: RFC 3986 section 3.2: host [ ":" port ] of an http URI. It has no user information (RFC 9110 section 4.2.4)
#: and no empty host (RFC 9110 section 4.2.1).
AUTHORITY = re.compile(
    r"(?:\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9\-._~!$&'()*+;=]|%[0-9A-Fa-f]{2})+)(?::[0-9]{0,5})?"
)

#: What gunicorn before 25 accepts in a target (RFC 9112 section 3.2) or a value (RFC 9110 section 5.5),
#: although it is invalid; used with ``search``.
CONTROL_IN_TARGET = re.compile(r"[\x00-\x20\x7f]")
CONTROL_IN_VALUE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

#: RFC 9112 section 5: field-line = field-name ":" OWS field-value OWS
FIELD_LINE_BYTES = _bytes(_FIELD_LINE)
#: Any number of field lines, each with its CRLF: a trailer section, or a header section without its end.
FIELD_LINES_BYTES = _bytes(rf"((?:{_FIELD_LINE}\r\n)*)")
#: Field lines, and the empty line that ends them.
FIELD_SECTION_BYTES = _bytes(rf"((?:{_FIELD_LINE}\r\n)*)\r\n")
#: The same as nearly all senders write it: each value behind one space, and no space behind the value.
PLAIN_FIELD_SECTION_BYTES = _bytes(rf"(?:{_TCHAR}+: (?![ \t]){_VCHAR}*(?<![ \t])\r\n)*\r\n")
#: RFC 9112 section 4: status-line = HTTP-version SP status-code SP [ reason-phrase ]; many servers omit the
#: second SP.
STATUS_LINE_BYTES = _bytes(_STATUS_LINE)
#: A status line and a header section: minor version, status code, reason phrase, field lines.
RESPONSE_HEAD_BYTES = _bytes(rf"{_STATUS_LINE}\r\n((?:{_FIELD_LINE}\r\n)*)\r\n")

#: RFC 9112 section 7.1: chunk-size = 1*HEXDIG
CHUNK_SIZE_BYTES = _bytes(r"[0-9A-Fa-f]+")
#: RFC 9112 section 7.1.1: chunk-ext = *( BWS ";" BWS chunk-ext-name [ BWS "=" BWS chunk-ext-val ] )
CHUNK_LINE_BYTES = _bytes(
    rf"([0-9A-Fa-f]+)((?:[ \t]*;[ \t]*{_TCHAR}+(?:[ \t]*=[ \t]*(?:{_TCHAR}+|{_QUOTED}))?)*)"
)
#: As servers send it: an extension of any visible characters, which the recipient ignores.
LENIENT_CHUNK_LINE_BYTES = _bytes(rf"([0-9A-Fa-f]+)((?:[ \t]*;{_VCHAR}*)?)")

#: The largest length of a body or a chunk, in bytes: a larger number does not fit into the signed 64 bits
#: that web servers and file systems use, so two parsers could read different numbers.
MAX_LENGTH = (1 << 63) - 1
