"""A WSGI application that tells how everything is: to Prometheus, health checks, programs and people.

    from gunicorn_passenger import status

    passenger.listen(9100, status)  # in every worker
    status.spawn(9100)  # or, in gunicorn.conf.py or the program: in a process of its own

- ``/``: a page for people, which refreshes itself;
- ``/health``: 200 while a worker serves, 503 while none does;
- ``/metrics``: in Prometheus' text format, or OpenMetrics where the client asks for it;
- ``/status.json``: the report that the others are made of.

It answers requests for local names and for IP addresses; further host names are set with
``status(hosts=[...])``, ``status.spawn(hosts=[...])`` or ``PASSENGER_STATUS_HOSTS``. Otherwise any web site
could read it in the browser of a user of this machine, by a name of its own that it lets point to 127.0.0.1
(DNS rebinding).

Runs in: a worker, or a process of its own. Must never: change anything, or trust a name that a program has
chosen.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib import resources
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

from gunicorn_passenger.config.address import Tcp, parse
from gunicorn_passenger.errors import PassengerError, SettingError
from gunicorn_passenger.serving.registry import registry as _application
from gunicorn_passenger.system.text import printable

#: Seconds for which a report is used again.
FRESH = 0.2
#: Seconds that the master has for a report.
PATIENCE = 2.0
#: Connections that the process of :func:`spawn` serves at a time.
_CONNECTIONS = 200
#: Seconds that it finishes what it has when it is told to stop.
_LEAVE = 2.0

#: Kinds of events that are counted from the start, so that the first is an increase.
_KINDS = ("crash", "reload", "takeover")

_JSON = "application/json"
_TEXT = "text/plain; charset=utf-8"

StartResponse = Callable[..., Any]


class ReportUnavailable(Exception):
    """There is no report; the text tells why."""


class StatusResponse(NamedTuple):
    """What is sent."""

    status: str
    type: str
    body: bytes
    more: tuple[tuple[str, str], ...] = ()


# --- where the report comes from ---------------------------------------------------------------


class ReportSource(Protocol):
    """Where the report comes from in this process."""

    #: whether this process is one of those that serve, so that it is healthy when it answers at all
    serves: bool

    def report(self) -> dict[str, Any]:
        """:raises Unavailable: when there is none."""


class _ChannelSource:
    """In a worker: the master is asked through the channel."""

    serves = True

    def report(self) -> dict[str, Any]:
        try:
            return dict(_application.report())
        except (PassengerError, OSError, ValueError) as error:
            raise ReportUnavailable(str(error)) from None


class _PipeSource:
    """In a process of its own: the master is asked through a standing line (see
    ``status/control_server.py``)."""

    serves = False

    def __init__(self, fd: int) -> None:
        """:param fd: a connected stream socket; it is owned from now on."""
        import gevent
        from gevent import socket as gsocket
        from gevent.event import Event

        self._sock = gsocket.socket(gsocket.AF_UNIX, gsocket.SOCK_STREAM, fileno=fd)
        self._answered = Event()
        self._asked = False
        self._answer: dict[str, Any] = {}
        self._lost = False
        gevent.spawn(self._read)

    def report(self) -> dict[str, Any]:
        # who comes while a question is out waits for its answer: there is never more than one
        if not self._asked and not self._lost:
            self._asked = True
            self._answered.clear()
            try:
                self._sock.sendall(b'{"command":"report"}\n')
            except OSError:
                self._lost = True
        if self._lost or not self._answered.wait(timeout=PATIENCE) or self._lost:
            raise ReportUnavailable(
                "the gunicorn master is gone" if self._lost else "the gunicorn master does not answer"
            )
        if "report" not in self._answer:
            raise ReportUnavailable(str(self._answer.get("error", "the gunicorn master has no report")))
        return dict(self._answer["report"])

    def _read(self) -> None:
        received = bytearray()
        while True:
            try:
                data = self._sock.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                break
            received += data
            line, end, rest = received.partition(b"\n")
            if end:
                try:
                    self._answer = dict(json.loads(line))
                except (ValueError, TypeError):
                    # the end of an answer that was not for this process, but for one before it
                    self._answer = {"error": "the gunicorn master is asked again"}
                received = rest
                self._asked = False
                self._answered.set()
        self._lost = True
        self._answered.set()


class _NullSource:
    """In a process of its own without a master: :func:`spawn` was called under plain Python."""

    serves = False

    def report(self) -> dict[str, Any]:
        raise ReportUnavailable("there is no report without gunicorn")


class _ReportCache:
    """The report of this process's source, used again for a moment."""

    def __init__(self) -> None:
        self.source: ReportSource = _ChannelSource()
        self._report: dict[str, Any] = {}
        self._at = float("-inf")

    def get(self) -> dict[str, Any]:
        """:raises Unavailable: when there is none."""
        if time.monotonic() - self._at > FRESH:
            report = self.source.report()
            self._report, self._at = {**report, "now": round(time.time(), 3)}, time.monotonic()
        return self._report


_reports = _ReportCache()


# --- for which hosts ---------------------------------------------------------------------------

#: Adds to the hosts that requests may name: ``"status.example.org,.internal"``.
HOSTS = "PASSENGER_STATUS_HOSTS"

_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?)*")


def _check_hosts(value: object, where: str) -> frozenset[str]:
    """Read a set of host names.

    :param value: a list of names, or one text with commas; ``".example.org"`` stands for all names below it,
    ``"*"``
        for every name.
    :param where: names the setting in the error.
    :raises SettingError: says which one cannot be read.
    """
    names = value.split(",") if isinstance(value, str) else value
    if (
        not isinstance(names, Iterable)
        or isinstance(names, bytes)
        or not all(isinstance(n, str) for n in names)
    ):
        raise SettingError(f"{where}: {value!r} is not a list of host names, such as ['status.example.org']")
    found = frozenset(text for name in names if (text := name.strip().lower().rstrip(".")))
    for name in sorted(found):
        if name != "*" and not _NAME.fullmatch(name.removeprefix(".")) and not _is_address(name):
            raise SettingError(
                f"{where}: {name[:80]!r} is not a host name; write names without a scheme, a port or a path, "
                "such as 'status.example.org', or '.example.org' for all names below it"
            )
    return found


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


#: Read once: a value that cannot be used ends the program with the sentence, and not a request.
_environment_hosts = _check_hosts(os.environ.get(HOSTS, ""), HOSTS)


def _host_allowed(environ: dict[str, Any], hosts: frozenset[str]) -> bool:
    """Whether a request names a host that this application answers for (RFC 9110, section 7.2).

    A web site can let a name of its own point to this machine, but cannot make a browser send another name,
    or a mere address.
    """
    text = environ.get("HTTP_HOST", "")
    if not text:
        return True  # HTTP/1.0; no browser
    client = environ.get("gunicorn.socket")
    if getattr(client, "family", None) == socket.AF_UNIX:
        return True  # no browser connects there; a web server that does has hosts of its own
    match = re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::[0-9]*)?", text)
    host = match.group(1).lower().rstrip(".") if match else ""
    if _is_address(host) or host == "localhost" or host.endswith(".localhost"):
        return True
    if not _NAME.fullmatch(host):
        return False
    if "*" in hosts or host in hosts or any(name[0] == "." and host.endswith(name) for name in hosts):
        return True
    # the name that a server of this program was asked to listen on
    wants = (getattr(server, "want", None) for server in _application.servers)
    return any(isinstance(want, Tcp) and want.host.lower().rstrip(".") == host for want in wants)


# --- the application ---------------------------------------------------------------------------


class StatusApplication:
    """The WSGI application; it may be mounted below a prefix (``SCRIPT_NAME``)."""

    def __init__(self, hosts: object = ()) -> None:
        """
        :param hosts: names that requests may have in their Host header, beside local ones and addresses.
        :raises SettingError: for what is not a host name.
        """
        self._hosts = _check_hosts(hosts, "status(hosts=...)")
        # the name that its server has in the report
        self.__module__, self.__qualname__ = "gunicorn_passenger", "status"

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        return _respond(environ, start_response, self._hosts)


def application(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    """The WSGI application; it may be mounted below a prefix (``SCRIPT_NAME``)."""
    return _respond(environ, start_response, frozenset())


def _respond(
    environ: dict[str, Any], start_response: StartResponse, hosts: frozenset[str]
) -> Iterable[bytes]:
    if _host_allowed(environ, hosts | _environment_hosts):
        answer = _answer(environ)
    else:
        host = printable(environ["HTTP_HOST"][:100].encode("latin-1", "replace").decode("utf-8", "replace"))
        text = (
            f"The status is not shown to requests for the host {host!r}: call status(hosts=[...]) or "
            f"status.spawn(hosts=[...]) with this name, or set {HOSTS}, if it is yours.\n"
        )
        answer = StatusResponse("403 Forbidden", _TEXT, text.encode())
    headers = [
        ("Content-Type", answer.type),
        ("Content-Length", str(len(answer.body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        *answer.more,
    ]
    start_response(answer.status, headers)
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [answer.body]


def _answer(environ: dict[str, Any]) -> StatusResponse:
    path = environ.get("PATH_INFO", "")
    if not path and environ.get("SCRIPT_NAME"):
        # the page's own addresses are relative to what ends in a slash
        last = environ["SCRIPT_NAME"].rpartition("/")[2].encode("latin-1")
        return StatusResponse("308 Permanent Redirect", _TEXT, b"", (("Location", f"./{quote(last)}/"),))
    answer = _PATHS.get(path or "/")
    if answer is None:
        return StatusResponse("404 Not Found", _TEXT, b"There are: /, /health, /metrics, /status.json\n")
    if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
        return StatusResponse("405 Method Not Allowed", _TEXT, b"GET or HEAD\n", (("Allow", "GET, HEAD"),))
    try:
        return answer(environ)
    except ReportUnavailable as error:
        return StatusResponse("503 Service Unavailable", _TEXT, f"{error}\n".encode())


def _health(_environ: dict[str, Any]) -> StatusResponse:
    counts: dict[str, int] | None = {"ready": 0, "leaving": 0, "booting": 0}
    why = ""
    try:
        assert counts is not None
        for worker in _reports.get()["workers"]:
            # "running": of another worker class, of which no more is known
            state = "ready" if worker["state"] == "running" else worker["state"]
            counts[state] = counts.get(state, 0) + 1
        serves = counts["ready"] + counts["leaving"] > 0
    except ReportUnavailable as error:
        counts, why = None, str(error)
        serves = _reports.source.serves
    body = {"status": "ok" if serves else "unavailable", "workers": counts} | ({"why": why} if why else {})
    return StatusResponse(
        "200 OK" if serves else "503 Service Unavailable", _JSON, json.dumps(body).encode() + b"\n"
    )


def _status(_environ: dict[str, Any]) -> StatusResponse:
    return StatusResponse("200 OK", _JSON, json.dumps(_reports.get()).encode() + b"\n")


# --- the page ----------------------------------------------------------------------------------


def _page(_environ: dict[str, Any]) -> StatusResponse:
    return _load_page()


def _load_page() -> StatusResponse:
    if not _pages:
        text = resources.files("gunicorn_passenger.status").joinpath("page.html").read_text("utf-8")
        policy = (
            "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'; "
            f"style-src {_digest(text, 'style')}; script-src {_digest(text, 'script')}"
        )
        _pages.append(
            StatusResponse(
                "200 OK",
                "text/html; charset=utf-8",
                text.encode(),
                (("Content-Security-Policy", policy),),
            )
        )
    return _pages[0]


_pages: list[StatusResponse] = []


def _digest(text: str, element: str) -> str:
    """What a content security policy calls an inline element by (CSP 3, section 2.3.1)."""
    (inline,) = re.findall(f"<{element}>(.*?)</{element}>", text, re.S)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


# --- metrics -----------------------------------------------------------------------------------


def _metrics(environ: dict[str, Any]) -> StatusResponse:
    try:
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder
    except ImportError:
        return StatusResponse(
            "501 Not Implemented", _TEXT, b"/metrics needs: pip install 'gunicorn-passenger[metrics]'\n"
        )
    registry = CollectorRegistry()
    registry.register(_Collector(_families))
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        registry.register(_Collector(_programs_own))
    try:
        encode, content_type = choose_encoder(environ.get("HTTP_ACCEPT", ""))
    except (TypeError, ValueError):
        # it does not like every Accept, such as one with an unknown version
        encode, content_type = choose_encoder("")
    try:
        return StatusResponse("200 OK", content_type, encode(registry))
    except (ValueError, TypeError, ArithmeticError) as error:
        # a label or a value of the program's own that has no form there, such as a lone surrogate
        _without_own(error)
        registry = CollectorRegistry()
        registry.register(_Collector(_families))
        return StatusResponse("200 OK", content_type, encode(registry))


def _without_own(error: Exception) -> None:
    logging.getLogger("gunicorn.error").warning(
        "gunicorn-passenger: /metrics goes without the program's own: %s: %s",
        type(error).__name__,
        printable(str(error)[:1000]),
    )


class _Collector:
    """What ``prometheus_client`` calls a collector."""

    def __init__(self, families: Callable[[], Iterable[Any]]) -> None:
        self.collect = families


def _programs_own() -> Iterable[Any]:
    """What the program itself counts, of all its processes (``prometheus_client``'s multiprocess mode)."""
    for last in (False, True):
        try:
            from prometheus_client import multiprocess

            with os.scandir(os.environ["PROMETHEUS_MULTIPROC_DIR"]) as entries:
                # a worker's named pipe would keep whatever opens it waiting for ever
                files = [
                    entry.path
                    for entry in entries
                    if entry.name.endswith(".db") and entry.is_file(follow_symlinks=False)
                ]
            collector: Any = multiprocess.MultiProcessCollector
            return list(collector.merge(files, accumulate=True))
        except Exception as error:
            if last:
                # a full disk, a file that is broken: the rest is worth having all the same
                _without_own(error)
            else:
                time.sleep(0.02)  # a worker may have been making its file
    return []


class _MetricFamily:
    """One metric. Samples of the same labels are added up: one that comes twice spoils the whole page."""

    def __init__(self, kind: Any, name: str, text: str, *labels: str) -> None:
        self._family = kind(f"gunicorn_passenger_{name}", text, labels=labels)
        self._samples: dict[tuple[str, ...], float] = {}

    def add(self, value: float | None, *labels: str) -> None:
        """:param value: ``None`` where nobody counts: no sample."""
        if value is not None:
            labels = tuple(printable(label) for label in labels)
            self._samples[labels] = self._samples.get(labels, 0) + value

    def done(self) -> Any:
        for labels, value in self._samples.items():
            self._family.add_metric(labels, value)
        return self._family


def _families() -> Iterator[Any]:
    """The report as metrics. Totals include workers that are gone, so they never go back."""
    from prometheus_client.core import CounterMetricFamily as Counter
    from prometheus_client.core import GaugeMetricFamily as Gauge

    up = _MetricFamily(Gauge, "up", "Whether the gunicorn master has answered")
    try:
        report = _reports.get()
    except ReportUnavailable:
        up.add(0)
        yield up.done()
        return
    up.add(1)
    info = _MetricFamily(Gauge, "info", "What runs; always 1", "name", "version")
    info.add(1, report["name"], report["version"])
    started = _MetricFamily(Gauge, "start_time_seconds", "When the master was started, in Unix time")
    started.add(report["started"])
    workers = _MetricFamily(Gauge, "workers", "Worker processes", "state")
    for state in ("booting", "ready", "leaving"):
        workers.add(0, state)
    memory = _MetricFamily(Gauge, "memory_bytes", "Memory that is resident", "process")
    memory.add(report["memory"], "master")
    memory.add(0, "workers")
    for worker in report["workers"]:
        workers.add(1, worker["state"])
        memory.add(worker["memory"], "workers")
    events = _MetricFamily(Counter, "events", "Reloads, crashes, takeovers and other events", "kind")
    for kind in _KINDS:
        events.add(0, kind)
    for kind, count in report["totals"].items():
        events.add(count, kind)
    for family in (up, info, started, workers, memory, events):
        yield family.done()
    yield from _server_families(report["servers"], Gauge, Counter)
    yield from _daemon_families(report.get("daemons", []), Gauge, Counter)


def _server_families(servers: list[dict[str, Any]], gauge: Any, counter: Any) -> Iterator[Any]:
    by_key = {
        "connections": (gauge, "server_connections", "Connections that are open"),
        "accepted": (counter, "server_accepted", "Connections that were accepted"),
        "requests": (counter, "server_requests", "Requests that were answered"),
        "bytes": (counter, "server_sent_bytes", "Bytes that were sent to clients"),
        "errors": (counter, "server_errors", "Answers of 500 and above, and those that broke off"),
    }
    for key, (kind, name, text) in by_key.items():
        family = _MetricFamily(kind, name, text, "server", "address")
        for server in servers:
            family.add(server[key], server["name"], server["address"])
        yield family.done()
    accepting = _MetricFamily(gauge, "server_workers", "Workers that accept connections", "server", "address")
    for server in servers:
        accepting.add(len(server["workers"]), server["name"], server["address"])
    yield accepting.done()


def _daemon_families(daemons: list[dict[str, Any]], gauge: Any, counter: Any) -> Iterator[Any]:
    up = _MetricFamily(gauge, "daemon_up", "Whether the daemon runs", "daemon")
    restarts = _MetricFamily(
        counter, "daemon_restarts", "How often it was started again after it had died", "daemon"
    )
    memory = _MetricFamily(gauge, "daemon_memory_bytes", "Memory that is resident", "daemon")
    for daemon in daemons:
        up.add(daemon["state"] == "running", daemon["name"])
        restarts.add(daemon["restarts"], daemon["name"])
        memory.add(daemon["memory"], daemon["name"])
    for family in (up, restarts, memory):
        yield family.done()


_PATHS: dict[str, Callable[[dict[str, Any]], StatusResponse]] = {
    "/": _page,
    "/health": _health,
    "/metrics": _metrics,
    "/status.json": _status,
}


# --- in a process of its own -------------------------------------------------------------------


def spawn(listen: Any, *, name: str = "status", hosts: object = (), **options: Any) -> Any:
    """Serve this application from a daemon, which answers while all workers are busy or gone.

    Called in ``gunicorn.conf.py`` or in the program; under any worker class.

    :param listen: where, as in ``Server.listen()``: a port, ``"host:port"``, ``"unix:/path"`` or ``"auto"``.
    :param name: of the daemon.
    :param hosts: names that requests may have in their Host header, beside local ones, IP addresses and the
    names in
        ``listen``; ``".example.org"`` stands for all names below it.
    :param options: as in :func:`gunicorn_passenger.spawn`.
    :raises PassengerError: as there.
    """
    from gunicorn_passenger.daemons import api as daemons

    if listen is None or listen == []:
        raise SettingError(
            "status.spawn() needs to know where to listen: a port, 'host:port' or 'unix:/path'"
        )
    allowed = sorted(_check_hosts(hosts, "status.spawn(hosts=...)") | _names_in(listen))
    args = [allowed] if allowed else []
    return daemons.spawn(serve, name=name, listen=listen, args=args, report=True, **options)


def _names_in(listen: Any) -> frozenset[str]:
    """The host names that the daemon is to listen on."""
    wants = []
    for item in listen if isinstance(listen, list) else [listen]:
        with suppress(PassengerError):  # said by daemons.spawn(), with the line of the user's file
            wants.append(parse(item))
    names = {want.host.lower().rstrip(".") for want in wants if isinstance(want, Tcp)}
    return frozenset(name for name in names if _NAME.fullmatch(name) and not _is_address(name))


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

    end = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, end.set)
    line = os.environ.pop("PASSENGER_REPORT_FD", "")
    _reports.source = _PipeSource(int(line)) if line else _NullSource()
    cfg = Config()
    cfg.set("worker_connections", _CONNECTIONS)
    log = cfg.logger_class(cfg)
    app = StatusApplication(hosts)
    accepting = []
    for fd in range(3, 3 + int(os.environ["LISTEN_FDS"])):
        sock = gsocket.socket(fileno=fd)
        sock.setblocking(True)  # gevent's own: for the kernel it does not block
        accepting.append(make_acceptor(sock, app, cfg, log, StandaloneWorker()))
        accepting[-1].start()
    end.wait()
    for one in accepting:
        one.stop_accepting()
    with gevent.Timeout(_LEAVE, False):
        while not all(one.idle() for one in accepting):
            gevent.sleep(0.02)
