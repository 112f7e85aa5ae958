"""What all requests of one listener share.

Process: a serving process.
Never: hold anything of a single request.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from operator import methodcaller
from typing import Any, ClassVar

from gunicorn.http import errors as http_errors
from gunicorn.http import message
from gunicorn.http.wsgi import base_environ
from gunicorn.workers.base import Worker as GunicornWorker

from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.config.settings import Timeouts
from gunicorn_passenger.http.access_log import AccessLog
from gunicorn_passenger.http.error_stream import ErrorStream
from gunicorn_passenger.http.greenlet_pool import GreenletPool
from gunicorn_passenger.http.request_head import ConnectionContext, HeadReader
from gunicorn_passenger.http.timeouts import IdleTicker, TimeoutQueue
from gunicorn_passenger.http.write_coalescing import coalescer_for_hub

#: How many clients' addresses are cached with whether they are trusted.
_REMEMBER = 4096
#: Seconds: a connection that is idle for one to two ticks gives up its greenlet.
_TICK = 0.1
#: Seconds without a byte after which a client that was refused has sent all of its request.
_LINGER = 2.0


#: Parse errors that are not the client's fault: gunicorn sends 500. gunicorn 23 knows the first alone.
_SERVER_ERRORS = tuple(
    getattr(http_errors, name)
    for name in ("ConfigurationProblem", "InvalidResponseHeader", "InvalidResponseHeaderName")
    if hasattr(http_errors, name)
)

#: What every request sets in its environ.
_EACH = (
    "PATH_INFO",
    "SCRIPT_NAME",
    "RAW_URI",
    "SERVER_NAME",
    "SERVER_PORT",
    "gunicorn.socket",
    "wsgi.input",
    "wsgi.early_hints",
)


#: Gives a connection (its descriptor, and what was read of it) to a sibling; returns whether that serves it.
Give = Callable[[int, bytes], bool]
#: Finds the sibling that a request belongs to (``None``: this worker), by its connection and header section.
Sticky = Callable[[Any, bytes], Give | None]


class StandaloneWorker:
    """Stands in for gunicorn's worker under plain Python."""

    alive = True
    nr = 0
    max_requests: ClassVar[int] = sys.maxsize

    def retire(self) -> None:
        """Do nothing: plain Python has no limit of requests."""


class ListenerContext:
    """Joins one WSGI application to the connections of one listener."""

    def __init__(
        self,
        app: Any,
        cfg: Any,
        log: Log,
        worker: Any,
        sockname: Any,
        timeouts: Timeouts,
        closes_websockets_on_exit: bool = True,
    ) -> None:
        """
        :param app: the WSGI callable; may be replaced while it serves.
        :param cfg: gunicorn's configuration, as it applies to this server.
        :param log: gunicorn's logger.
        :param worker: gunicorn's worker, or a :class:`StandaloneWorker`.
        :param sockname: the listener's name; a string for a UNIX socket.
        """
        self.app = app
        self.cfg = cfg
        self.log = log
        self.worker = worker
        self.sockname = sockname
        self.keepalive = bool(cfg.keepalive)
        #: whether a worker that exits closes the application's WebSockets
        self.closes_websockets_on_exit = closes_websockets_on_exit
        #: set before the listener accepts; ``None`` when this worker may serve all requests that it reads
        self.sticky: Sticky | None = None
        #: whether the server has stopped accepting
        self.closing = False
        #: counters: requests, bytes sent, responses with a status of 500 or above
        self.requests = self.sent = self.errors = 0
        #: whether the application is a proxy, whose code is short, so that pending responses may wait for it
        self.is_proxy = False
        self.sendfile = cfg.sendfile is not False
        self.after = self._hook("post_request")
        before = self._hook("pre_request")
        self.reader = HeadReader(
            cfg,
            sockname,
            always_request=bool(before or self.after),
            before=(lambda request: before(worker, request)) if before else (lambda request: None),
        )
        self.access = AccessLog(cfg, log)
        #: whether there is an access log
        self.logs = self.access.enabled
        keepalive = cfg.keepalive or 1.0
        #: connections that wait for their next request
        self.idle = TimeoutQueue(keepalive)
        #: Connections that have sent nothing: at first as long as an idle one may wait, then until the
        #: timeout for a header section. From then on the acceptor may close them to make room.
        self.new = TimeoutQueue(min(keepalive, timeouts.head), methodcaller("wait_longer"))
        self.silent = TimeoutQueue(max(timeouts.head - keepalive, 0.0))
        #: busy connections that become idle
        self.idle_ticker = IdleTicker(_TICK)
        #: requests whose headers have not come to their end, and bodies
        self.heads = TimeoutQueue(timeouts.head)
        self.bodies = TimeoutQueue(timeouts.body)
        #: responses that the client does not read
        self.writes = TimeoutQueue(timeouts.write, methodcaller("on_write_timeout"))
        self.lingering = TimeoutQueue(_LINGER)
        self.greenlets = GreenletPool()
        self.coalescer = coalescer_for_hub()
        self._template: dict[str, Any] = base_environ(cfg) | {
            "wsgi.errors": ErrorStream(cfg),
            "wsgi.multithread": True,
        }
        self._template |= dict.fromkeys(_EACH)
        if isinstance(sockname, tuple):
            self._template |= {"SERVER_NAME": sockname[0], "SERVER_PORT": str(sockname[1])}
        self._is_unix = not isinstance(sockname, tuple)
        #: the same for all clients without an address
        self._unix_context = ConnectionContext("", self._template | {"REMOTE_ADDR": ""}, True)
        self._trusted: dict[str, bool] = {}

    def _hook(self, name: str) -> Any:
        """A hook; ``None`` when it does nothing. The default ``pre_request`` only logs, at level debug."""
        hook = getattr(self.cfg, name)
        if hook is type(self.cfg.settings[name]).default and (name != "pre_request" or not self._debugs()):
            return None
        return hook

    def _debugs(self) -> bool:
        logger = getattr(self.log, "error_log", None)
        if logger is None:
            return str(self.cfg.loglevel).lower() == "debug"
        return bool(logger.isEnabledFor(logging.DEBUG))

    def receives_ahead(self) -> bool:
        """Whether it receives from all readable connections before it serves one (:mod:`.connection`)."""
        return self.coalescer.clients_sleep and self._is_unix and not self.is_proxy

    def new_context(self, addr: Any) -> ConnectionContext:
        """What all requests of one connection share.

        :param addr: a tuple as ``accept()`` gives it, or an empty string for a client of a UNIX socket,
            which has no address.
        """
        if not addr:
            return self._unix_context
        host: str = addr[0]
        base = self._template.copy()
        base["REMOTE_ADDR"] = host
        base["REMOTE_PORT"] = str(addr[1])
        trusted = self._trusted.get(host)
        if trusted is None:
            trusted = self._trusts(host)
        return ConnectionContext(addr, base, trusted)

    def _trusts(self, host: str) -> bool:
        allowed = self.cfg.forwarded_allow_ips
        check = getattr(message, "_ip_in_allow_list", None)
        if check is not None:
            trusted = bool(check(host, allowed, self.cfg.forwarded_allow_networks()))
        else:
            trusted = "*" in allowed or host in allowed
        if len(self._trusted) >= _REMEMBER:
            self._trusted.clear()
        self._trusted[host] = trusted
        return trusted

    def refuse(self, request: Any, sock: Any, addr: Any, error: BaseException) -> None:
        """Log and send what gunicorn does for a bad request or a failed application.

        :param request: gunicorn's request object, where there is one: then it is in the access log, too.
        """
        if not isinstance(error, http_errors.ParseException) or isinstance(error, _SERVER_ERRORS):
            self.errors += 1
        GunicornWorker.handle_error(self, request, sock, addr, error)

    def leave_to_parent(self) -> None:
        """In a forked child: no timeout of a connection concerns the child."""
        for queue in (
            self.idle,
            self.new,
            self.silent,
            self.heads,
            self.bodies,
            self.writes,
            self.lingering,
        ):
            queue.clear()
        self.idle_ticker.clear()

    def on_max_requests(self) -> None:
        """The worker has reached ``max_requests``: another one replaces it."""
        if self.worker.alive:
            self.log.info("Autorestarting worker after current request.")
            self.worker.retire()
