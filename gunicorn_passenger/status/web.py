"""The status application: shows the report to Prometheus, health checks, programs and people.

    from gunicorn_passenger import status

    passenger.listen(9100, status)  # in every worker
    status.spawn(9100)  # or, in gunicorn.conf.py or the program: in a process of its own

- ``/``: a page for people, which refreshes itself;
- ``/health``: 200 while at least one worker serves (as a worker that responds does itself), otherwise 503;
- ``/metrics``: the Prometheus text format, or OpenMetrics where the client asks for it;
- ``/status.json``: the report that the other pages are made of.

It responds to requests for local names and for IP addresses. Further host names are set with
``status(hosts=[...])``, ``status.spawn(hosts=[...])``, ``configure(status_hosts=[...])`` or
``PASSENGER_STATUS_HOSTS``. Otherwise any web site could read the report in the browser of a user of this
machine, with a name of its own that points to 127.0.0.1 (DNS rebinding).

Process: a worker, or the status daemon. Never: change anything, or trust a name that a program has chosen.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from gunicorn_passenger.config import host_names
from gunicorn_passenger.config.address import Tcp, parse
from gunicorn_passenger.config.settings import config_file_error, settings
from gunicorn_passenger.errors import PassengerError, SettingError
from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.status import health, metrics
from gunicorn_passenger.status.sources import NullSource, PipeSource, ReportUnavailable, reports
from gunicorn_passenger.system.text import printable

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

#: Connections that the status daemon serves at a time.
_CONNECTIONS = 200
#: Seconds that the status daemon drains its connections after SIGTERM.
_DRAIN_TIMEOUT = 2.0

_JSON = "application/json"
_TEXT = "text/plain; charset=utf-8"


class StatusResponse(NamedTuple):
    """A response of the status application."""

    status: str
    type: str
    body: bytes
    more: tuple[tuple[str, str], ...] = ()


# a value of PASSENGER_STATUS_HOSTS that cannot be used ends the program here, and not its first request
settings.status_hosts()


# --- the application ---------------------------------------------------------------------------


class StatusApplication:
    """The WSGI application; it may be mounted below a prefix (``SCRIPT_NAME``)."""

    def __init__(self, hosts: object = ()) -> None:
        """
        :param hosts: names that requests may have in their Host header, beside local names and addresses.
        :raises SettingError: for a value that is not a host name.
        """
        self._hosts = host_names.parse_host_names(hosts, "status(hosts=...)")
        # the name that its server has in the report
        self.__module__, self.__qualname__ = "gunicorn_passenger", "status"

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return _respond(environ, start_response, self._hosts)


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """The WSGI application; it may be mounted below a prefix (``SCRIPT_NAME``)."""
    return _respond(environ, start_response, frozenset())


def _respond(
    environ: WSGIEnvironment, start_response: StartResponse, hosts: frozenset[str]
) -> Iterable[bytes]:
    response = _route(environ) if _host_allowed(environ, hosts) else _wrong_host(environ)
    headers = [
        ("Content-Type", response.type),
        ("Content-Length", str(len(response.body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        *response.more,
    ]
    start_response(response.status, headers)
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [response.body]


def _host_allowed(environ: WSGIEnvironment, hosts: frozenset[str]) -> bool:
    """Whether the request names a host that this application serves (RFC 9110, section 7.2).

    A web site can let a name of its own point to this machine, but cannot make a browser send another name
    or an address.
    """
    header = environ.get("HTTP_HOST", "")
    if not header:
        return True  # HTTP/1.0, which browsers do not use
    client = environ.get("gunicorn.socket")
    if getattr(client, "family", None) == socket.AF_UNIX:
        return True  # browsers do not connect there, and a web server that does checks its own host names
    host = host_names.host_of(header)
    if host_names.is_ip_address(host) or host == "localhost" or host.endswith(".localhost"):
        return True
    if not host_names.is_host_name(host):
        return False
    if host_names.matches(host, hosts | settings.status_hosts()):
        return True
    # the host name of an address on which a server of this program listens
    addresses = (getattr(server, "requested_address", None) for server in registry.servers)
    return any(isinstance(want, Tcp) and host_names.normalize(want.host) == host for want in addresses)


def _wrong_host(environ: WSGIEnvironment) -> StatusResponse:
    host = printable(environ["HTTP_HOST"][:100].encode("latin-1", "replace").decode("utf-8", "replace"))
    text = (
        f"The status is not shown to requests for the host {host!r}. If this name is yours, allow it with "
        "status(hosts=[...]), status.spawn(hosts=[...]), configure(status_hosts=[...]) or "
        "PASSENGER_STATUS_HOSTS.\n"
    )
    return StatusResponse("403 Forbidden", _TEXT, text.encode())


def _route(environ: WSGIEnvironment) -> StatusResponse:
    path = environ.get("PATH_INFO", "")
    if not path and environ.get("SCRIPT_NAME"):
        # the page's own addresses are relative to a path that ends in a slash
        last = environ["SCRIPT_NAME"].rpartition("/")[2].encode("latin-1")
        return StatusResponse("308 Permanent Redirect", _TEXT, b"", (("Location", f"./{quote(last)}/"),))
    show = _PATHS.get(path or "/")
    if show is None:
        text = f"Not found. Available: {', '.join(_PATHS)}\n"
        return StatusResponse("404 Not Found", _TEXT, text.encode())
    if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
        text = "Only GET and HEAD are allowed.\n"
        return StatusResponse("405 Method Not Allowed", _TEXT, text.encode(), (("Allow", "GET, HEAD"),))
    try:
        return show(environ)
    except ReportUnavailable as error:
        return StatusResponse("503 Service Unavailable", _TEXT, f"{error}\n".encode())


def _health(_environ: WSGIEnvironment) -> StatusResponse:
    body: dict[str, Any] = {"status": "ok"}
    try:
        body["workers"] = counts = health.count_workers(reports.get())
        serves = health.serves(counts)
    except ReportUnavailable as error:
        serves = reports.source.serves
        body |= {"workers": None, "why": str(error)}
    if serves:
        return StatusResponse("200 OK", _JSON, _encode(body))
    return StatusResponse("503 Service Unavailable", _JSON, _encode({**body, "status": "unavailable"}))


def _status(_environ: WSGIEnvironment) -> StatusResponse:
    return StatusResponse("200 OK", _JSON, _encode(reports.get()))


def _encode(value: Mapping[str, object]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _metrics(environ: WSGIEnvironment) -> StatusResponse:
    try:
        content_type, body = metrics.render(environ.get("HTTP_ACCEPT", ""))
    except ImportError:
        return StatusResponse(
            "501 Not Implemented", _TEXT, b"/metrics needs: pip install 'gunicorn-passenger[metrics]'\n"
        )
    return StatusResponse("200 OK", content_type, body)


# --- the page ----------------------------------------------------------------------------------


@cache
def _load_page() -> StatusResponse:
    text = resources.files("gunicorn_passenger.status").joinpath("page.html").read_text("utf-8")
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; "
        f"style-src {_digest(text, 'style')}; script-src {_digest(text, 'script')}"
    )
    return StatusResponse(
        "200 OK", "text/html; charset=utf-8", text.encode(), (("Content-Security-Policy", policy),)
    )


def _digest(text: str, element: str) -> str:
    """The name of an inline element in a content security policy (CSP 3, section 2.3.1)."""
    (inline,) = re.findall(f"<{element}>(.*?)</{element}>", text, re.S)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


_PATHS: dict[str, Callable[[WSGIEnvironment], StatusResponse]] = {
    "/": lambda _: _load_page(),
    "/health": _health,
    "/metrics": _metrics,
    "/status.json": _status,
}


# --- the status daemon -------------------------------------------------------------------------


def spawn(listen: Any, *, name: str = "status", hosts: object = (), **options: Any) -> Any:
    """Serve this application from a daemon, which responds even while all workers are busy or have exited.

    Called in ``gunicorn.conf.py`` or in the program; under any worker class.

    :param listen: where, as in ``Server.listen()``: a port, ``"host:port"``, ``"unix:/path"`` or ``"auto"``.
    :param name: of the daemon.
    :param hosts: names that requests may have in their Host header, beside local names, IP addresses, the
        names in ``listen`` and the setting ``status_hosts``; ``".example.org"`` stands for all names below
        it. ``configure()`` has to be called first.
    :param options: as in :func:`gunicorn_passenger.spawn`.
    :raises PassengerError: as there.
    """
    from gunicorn_passenger.daemons import api as daemons

    try:
        allowed = _hosts_of_daemon(listen, hosts)
    except SettingError as error:
        if not daemons.is_reading_config():
            raise
        raise config_file_error(error) from None
    args = [sorted(allowed)] if allowed else []
    return daemons.spawn(serve, name=name, listen=listen, args=args, report=True, **options)


def _hosts_of_daemon(listen: Any, hosts: object) -> frozenset[str]:
    if listen is None or listen == []:
        raise SettingError(
            "status.spawn() needs to know where to listen: a port, 'host:port' or 'unix:/path'"
        )
    allowed = host_names.parse_host_names(hosts, "status.spawn(hosts=...)") | _names_in(listen)
    # the daemon is another interpreter, which configure() in this one does not reach
    return allowed | settings.status_hosts()


def _names_in(listen: Any) -> frozenset[str]:
    """The host names in the addresses on which the daemon listens."""
    addresses = []
    for item in listen if isinstance(listen, list) else [listen]:
        with suppress(PassengerError):  # daemons.spawn() raises it, with the line of the user's file
            addresses.append(parse(item))
    names = {host_names.normalize(address.host) for address in addresses if isinstance(address, Tcp)}
    return frozenset(
        name for name in names if host_names.is_host_name(name) and not host_names.is_ip_address(name)
    )


def serve(hosts: Iterable[str] = ()) -> None:
    """What the daemon runs: the sockets of ``LISTEN_FDS``, the report from ``PASSENGER_REPORT_FD``.

    :param hosts: as in :func:`spawn`.
    """
    import signal

    import gevent
    from gevent import socket as gsocket
    from gevent.event import Event
    from gunicorn.config import Config

    from gunicorn_passenger.http.listener_context import StandaloneWorker
    from gunicorn_passenger.serving.acceptors import make_acceptor

    stopping = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, stopping.set)
    fd = os.environ.pop("PASSENGER_REPORT_FD", "")
    reports.source = PipeSource(int(fd)) if fd else NullSource()
    cfg = Config()
    cfg.set("worker_connections", _CONNECTIONS)
    log = cfg.logger_class(cfg)
    app = StatusApplication(hosts)
    acceptors = []
    for descriptor in range(3, 3 + int(os.environ["LISTEN_FDS"])):
        sock = gsocket.socket(fileno=descriptor)
        sock.setblocking(True)  # for gevent; the kernel's socket does not block
        acceptors.append(make_acceptor(sock, app, cfg, log, StandaloneWorker()))
        acceptors[-1].start()
    stopping.wait()
    for acceptor in acceptors:
        acceptor.stop_accepting()
    with gevent.Timeout(_DRAIN_TIMEOUT, False):
        while not all(acceptor.idle() for acceptor in acceptors):
            gevent.sleep(0.02)
