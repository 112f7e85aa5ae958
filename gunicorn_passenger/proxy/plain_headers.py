"""The headers of an ordinary request, as bytes for the target.

Process: any process in which the proxy is mounted. A function without I/O.
Never: decide about a header that :mod:`.request_headers` has a rule for, but ``Host`` and ``Connection``.

Most requests have only headers that are forwarded as they are. Such headers need not become text, be checked
one by one and become bytes again: one pass over the bytes is enough.
"""

from __future__ import annotations

from itertools import repeat

from gunicorn_passenger.http.grammar import PLAIN_FIELD_SECTION_BYTES
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.request_headers import HOST, is_forwarded

#: How many names are cached, and how long one may be.
_REMEMBER = 1000
_SHORT = 64

#: What marks a line that is not simply forwarded; no header value has this character.
_MARK = b"\0"
#: A Connection header that changes nothing about the request. It is not forwarded.
_PERSISTENCE = frozenset(
    _MARK + b" " + option for option in (b"keep-alive", b"Keep-Alive", b"close", b"Close")
)

_partition = bytes.partition
_colons = repeat(b":")


class _LineStarts(dict[bytes, bytes]):
    """How the target gets a header's name, with the colon; a mark when the header is not simply forwarded."""

    def __init__(self, keep_case: bool) -> None:
        super().__init__()
        self._keep_case = keep_case

    def __missing__(self, name: bytes) -> bytes:
        low = name.lower()
        if low == b"connection":
            start = _MARK
        # names with an underscore can stand for others (gunicorn's header_map)
        elif b"_" in name or not (low == b"host" or is_forwarded(name.decode("latin-1"))):
            start = 2 * _MARK
        else:
            start = (name if self._keep_case else low) + b":"
        if len(name) <= _SHORT:
            if len(self) >= _REMEMBER:
                self.clear()
            self[name] = start
        return start


_kept, _lowered = _LineStarts(True), _LineStarts(False)


def forwards_plainly(options: Options) -> bool:
    """Whether these options leave the headers of an ordinary request as they are."""
    return bool(options.agent.max_idle) and not (
        options.change_origin
        or options.xfwd
        or options.forwarded
        or options.via
        or options.set_headers
        or options.sticky
    )


def plain_lines(head: bytes, host: str | None, keep_case: bool) -> bytes | None:
    """The header lines for the target, with the empty line.

    :param head: a request line, a header section and the empty line, which our own server has read.
    :param host: the value of its Host; several would be joined by commas.
    :param keep_case: whether names keep their letter case; else they are lower case.
    :returns: ``None`` for a request that is not ordinary: it has no valid Host, or a header that is not
        simply forwarded.
    """
    begin = head.find(b"\r\n") + 2
    if not host or HOST.fullmatch(host) is None or PLAIN_FIELD_SECTION_BYTES.fullmatch(head, begin) is None:
        return None
    starts = _kept if keep_case else _lowered
    # each step for all lines at once: this is most of what the proxy does for such a request
    parts = map(_partition, head[begin:-4].split(b"\r\n"), _colons)
    lines = [starts[name] + value for name, _, value in parts]
    lines.append(b"\r\n")
    block = b"\r\n".join(lines)
    if _MARK in block:
        block = b"\r\n".join([line for line in lines if line not in _PERSISTENCE])
    return None if _MARK in block else block
