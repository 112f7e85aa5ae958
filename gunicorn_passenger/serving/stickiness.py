"""Which worker a request belongs to, by the setting ``sticky``.

Process: a worker, in the greenlet of a connection.
Never: trust what a client sends: a request that names no live worker is served by the worker that read it.

A worker is named by its tag, which the master makes and no client can guess. The header section is looked at
before it is parsed, so a request that is passed on is parsed once, and no hook sees it twice.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64encode
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from hmac import compare_digest
from itertools import count
from typing import Any

import gevent
from werkzeug.wrappers import Request

from gunicorn_passenger.config.address import format_sockname
from gunicorn_passenger.http.acceptor import Acceptor
from gunicorn_passenger.http.faults import report_fault
from gunicorn_passenger.http.listener_context import Give
from gunicorn_passenger.http.request_head import NO_HEAD, HeadReader
from gunicorn_passenger.serving.acceptors import ListenerHandler
from gunicorn_passenger.serving.mailboxes import Mailboxes, Sibling

#: The name of the cookie, unless the program gives one.
_DEFAULT_COOKIE = "passenger_worker"
#: Characters of a tag.
TAG_LENGTH = 16
#: Characters of a signature, 144 bits.
_SIGNATURE_LENGTH = 24
#: the first request of an Engine.IO client
_BEGINS = re.compile(rb"[?&]EIO=[0-9]")
_SID = re.compile(rb"[?&]sid=([A-Za-z0-9_-]{%d})" % TAG_LENGTH)
#: by which the siblings of a worker that drains take turns
_turns = count()
#: Seconds until a sibling that has just started is known here, too.
_NEWS_TIME = 0.001


class Stickiness:
    """Finds the siblings that the requests of one listener belong to."""

    def __init__(self, mailboxes: Mailboxes, key: str) -> None:
        """:param key: of the listener, see :meth:`.acceptor_table.AcceptorTable.by_key`."""
        self._mailboxes = mailboxes
        self._key = key
        self._tag = mailboxes.tag.encode()

    def _give_to(self, tag: str) -> Give | None:
        """:returns: ``None`` for a tag that no live sibling has."""
        mailboxes = self._mailboxes
        sibling = mailboxes.sibling(tag)
        if sibling is None:
            # the master has announced a new sibling before it served its first client, but that message may
            # not be read yet
            gevent.sleep(_NEWS_TIME)
            sibling = mailboxes.sibling(tag)
        return None if sibling is None else self._give(sibling)

    def _give(self, sibling: Sibling) -> Give:
        return partial(self._mailboxes.pass_connection, sibling, self._key)


class BySessionId(Stickiness):
    """``sticky="socketio"``: Engine.IO's session id, which begins with the tag of its worker.

    A worker that drains begins no new session, which would end with it: a sibling that serves gets the
    request.
    """

    def __call__(self, _connection: Any, head: bytes) -> Give | None:
        # a cookie or a Referer may have the id of another session
        line = head.find(b"\r\n")
        if head.find(b"sid=", 0, line) < 0 and not self._mailboxes.is_leaving:
            return None
        tag = self.owner(head)
        return self.give_to(tag) if tag else None

    def owner(self, head: bytes) -> str:
        """The tag of the other worker that a request belongs to; empty if there is none.

        Any thread may call.
        """
        line = head.find(b"\r\n")
        found = _SID.search(head, 0, line)
        if found is not None:
            return "" if found[1] == self._tag else found[1].decode()
        begins = self._mailboxes.is_leaving and _BEGINS.search(head, 0, line) is not None
        serving = self._mailboxes.serving() if begins else []
        return serving[next(_turns) % len(serving)] if serving else ""

    def give_to(self, tag: str) -> Give | None:
        """Called in a greenlet.

        :returns: ``None`` for a tag that no live sibling has; it is counted.
        """
        give = self._give_to(tag)
        if give is None:
            self._mailboxes.unknown += 1
        return give


class ByCookie(Stickiness):
    """``sticky="cookie"``: a cookie with the tag of the worker that has set it, and a signature.

    All workers of a master sign with one key, so each can check the cookie of a sibling. What begins the
    session ids of Socket.IO is the same tag; without the signature a client cannot make a cookie of it.
    """

    def __init__(self, mailboxes: Mailboxes, key: str, name: str) -> None:
        """:param name: of the cookie."""
        super().__init__(mailboxes, key)
        self._name = name.encode()
        self._own = self._signed(self._tag)
        self._pattern = re.compile(
            rb"\r\ncookie:(?:[^\r]*;)?[ \t]*%b=(([A-Za-z0-9_-]{%d})\.[A-Za-z0-9_-]{%d})[ \t]*[;\r]"
            % (re.escape(self._name), TAG_LENGTH, _SIGNATURE_LENGTH),
            re.IGNORECASE,
        )

    def _signed(self, tag: bytes) -> bytes:
        """The cookie that names a worker."""
        named = b"%b=%b" % (self._name, tag)
        digest = blake2b(named, digest_size=_SIGNATURE_LENGTH * 3 // 4, key=self._mailboxes.key).digest()
        return b"%b.%b" % (named, urlsafe_b64encode(digest))

    def __call__(self, connection: Any, head: bytes) -> Give | None:
        connection.extra_headers = b""
        if head.find(self._own) >= 0:
            return None
        found = self._pattern.search(head)
        give = None
        if found is not None and compare_digest(self._signed(found[2]), b"%b=%b" % (self._name, found[1])):
            give = self._give_to(found[2].decode())
        if give is None:
            connection.extra_headers = b"Set-Cookie: %b; Path=/; HttpOnly; SameSite=Lax\r\n" % self._own
        return give


class ByKey(Stickiness):
    """``sticky=function``: the program's own key of a request, by rendezvous hashing."""

    def __init__(
        self, mailboxes: Mailboxes, key: str, function: Callable[[Request], object], reader: HeadReader
    ) -> None:
        """
        :param function: returns the key of a request; ``None`` for a request that any worker may serve.
        :param reader: one without hooks: the request is read again by the worker that serves it.
        """
        super().__init__(mailboxes, key)
        self._function = function
        self._reader = reader

    def __call__(self, connection: Any, head: bytes) -> Give | None:
        try:
            environ, _, _ = self._reader.read(head, connection.context, NO_HEAD)
        except Exception:
            return None  # this worker refuses the request
        try:
            key = self._function(Request(environ))
        except Exception as error:
            report_fault("the function given as sticky= has failed, so any worker serves the request", error)
            return None
        if key is None:
            return None
        tags = self._mailboxes.serving()
        seed = str(key).encode("utf-8", "backslashreplace")
        tag = max(tags, key=lambda tag: blake2b(seed, digest_size=8, key=tag.encode()).digest(), default="")
        sibling = self._mailboxes.sibling(tag)
        return None if sibling is None else self._give(sibling)


def install(
    acceptor: ListenerHandler, sticky: object, mailboxes: Mailboxes, key: str, cfg: Any, log: Any
) -> None:
    """Have an acceptor pass on the connections of requests that belong to siblings.

    :param sticky: the setting, as :func:`.settings.check_sticky` returns it.
    :param key: of the listener.
    :param cfg: gunicorn's configuration.
    """
    if sticky == "socketio" and hasattr(acceptor, "use_sticky"):
        if mailboxes.open():
            acceptor.use_sticky(BySessionId(mailboxes, key))
    elif not isinstance(acceptor, Acceptor):
        log.warning(
            "%s: sticky=%r has no effect here. With TLS, HTTP/2 or the PROXY protocol, gunicorn's handler "
            "cannot pass connections to siblings: let the web server speak plain HTTP/1.1 to this address. "
            "An ASGI application can only have sticky='socketio'",
            format_sockname(acceptor.sockname),
            sticky,
        )
    elif not mailboxes.open():
        return
    elif callable(sticky):
        reader = HeadReader(cfg, acceptor.sockname)
        acceptor.listener.sticky = ByKey(mailboxes, key, sticky, reader)
    elif sticky == "socketio":
        acceptor.listener.sticky = BySessionId(mailboxes, key)
    else:
        name = str(sticky).partition(":")[2] or _DEFAULT_COOKIE
        acceptor.listener.sticky = ByCookie(mailboxes, key, name)
