"""A server of the program: what ``create_server()`` returns.

Process: a worker, plain Python, or the master with ``--preload``, where a server waits for the fork.
Never: bind a port itself; :mod:`.registry` knows where sockets come from.
"""

from __future__ import annotations

import _socket
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from gunicorn_passenger import errors
from gunicorn_passenger.config.address import Address, Primary, SockAddr, Tcp, format_sockname, parse
from gunicorn_passenger.config.settings import OFF, PLACEMENTS, check_placement, check_sticky, settings
from gunicorn_passenger.serving import server_errors
from gunicorn_passenger.serving.port_lease import AcceptGrant, PortLease
from gunicorn_passenger.system.text import MAX_NAME, printable

WSGIApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

S = TypeVar("S", bound="Server")

#: the states of a server, as ``servers()`` shows them
NEW, WAITING, LISTENING, STOPPED, CLOSED, LOST = "new", "waiting", "listening", "stopped", "closed", "lost"


class ListenAddress:
    """A listening socket of this process, and the key under which the master knows it."""

    def __init__(self, sock: Any, sockname: SockAddr | str | None, key: str = "") -> None:
        """
        :param sock: ``None`` while another worker accepts, and for the primary, whose socket the worker has.
        :param sockname: ``None`` while the address is not known.
        """
        self.sock = sock
        self.sockname = sockname
        self.key = key

    @property
    def address(self) -> tuple[str, int] | str | None:
        """``(host, port)``, or ``"unix:/path"``."""
        if isinstance(self.sockname, tuple):
            return self.sockname[0], self.sockname[1]
        return None if self.sockname is None else format_sockname(self.sockname)


class ServerHost(Protocol):
    """The registry of the servers of this process."""

    def add(self, server: Server) -> None: ...
    def remove(self, server: Server) -> None: ...


class Server:
    """Serves one WSGI application on one address, in every worker.

    A ``Server`` is itself a WSGI callable, so that ``application = create_server(app).listen("passenger")``
    is a module that gunicorn can load.
    """

    def __init__(self, app: WSGIApp, host: ServerHost, threads: int = 0) -> None:
        """
        :param threads: how many native threads run the application where its calls would block the server.
        """
        self.app = app
        self.threads = threads
        self._host = host
        self.placement = "shared"
        self._sticky: object = None
        self.state = NEW
        self._name: str | None = None
        self._requested: Address | None = None
        self._socket: ListenAddress | None = None
        #: the right to accept that the master manages; ``None`` for the primary and under plain Python
        self.lease: PortLease | None = None
        #: with the placement "each": its number among the servers of this base name, from 1
        self.position = 0
        #: the slot of the scoreboard in which the worker counts
        self.slot = -1

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        return self.app(environ, start_response)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.state} {self._label()}>"

    @property
    def needs_hub(self) -> bool:
        """Whether it accepts and serves in a hub of gevent's."""
        return True

    @property
    def name(self) -> str:
        """The name given to ``listen()``, or one made from the application's own.

        With the placement ``"each"`` a number follows, which a successor takes over with the port:
        ``"jobs.2"``.
        """
        return f"{self.base_name}.{self.position}" if self.position else self.base_name

    @property
    def base_name(self) -> str:
        """The name without a number."""
        return self._name or default_name(self.app)

    @property
    def given_name(self) -> str | None:
        """The name given to ``listen()``; ``None`` where the program gave none."""
        return self._name

    @property
    def address(self) -> tuple[str, int] | str | None:
        """The bound address: ``(host, port)`` or ``"unix:/path"``; ``None`` before and after."""
        return self._socket.address if self._socket is not None else None

    @property
    def sticky(self) -> object:
        """Which worker serves a request, see :meth:`listen`."""
        return settings.sticky(self.is_primary) if self._sticky is None else self._sticky

    @property
    def listening(self) -> bool:
        """Whether clients can connect. The worker accepts them now, or as soon as it is ready."""
        return self.state == LISTENING

    @property
    def requested_address(self) -> Address | None:
        """The address that the program gave to ``listen()``."""
        return self._requested

    @property
    def socket(self) -> ListenAddress | None:
        """The listening socket; ``None`` before ``listen()`` and after ``close()``."""
        return self._socket

    def listen(
        self: S,
        address: object,
        host: str = "127.0.0.1",
        *,
        name: str | None = None,
        placement: str = "shared",
        sticky: object = None,
        **unknown: object,
    ) -> S:
        """Accept connections on an address; the listening socket comes from the gunicorn master.

        :param address: ``"passenger"`` (the primary socket, which the web server reaches), a port
            number, ``"host:port"``, ``"[::1]:port"``, ``"unix:/path"``, or ``"auto"`` (any free port
            of the port allocation, one for all workers).
        :param host: the host for a bare port and for ``"auto"``.
        :param name: names the server in :func:`gunicorn_passenger.servers` and in the log.
        :param placement: ``"shared"``: all workers accept from the one socket. ``"one"``: one worker at a
            time accepts, another when that worker drains or dies. ``"each"``: every worker gets a port of its
            own; with a port number, the workers get the next free ports from there.
        :param sticky: which worker serves a request, with the placement ``"shared"``: ``"socketio"`` (the one
            that has its Engine.IO session), ``"cookie"`` or ``"cookie:NAME"`` (the one that has set the
            cookie), or a function that returns the key of a :class:`werkzeug.wrappers.Request`: all requests
            with the same key go to the same worker. ``"off"``: the worker that reads it, as without the
            option. The primary takes the setting ``sticky`` when the option is not given.
        :returns: the server itself.
        :raises errors.ListenError: (an ``OSError``) when it cannot listen there; ``PortNotAllocated``
            and ``PortInUse`` are subclasses.
        :raises errors.AlreadyInstalled: when another server has the primary socket.
        :raises TypeError: for an option that does not exist.
        """
        for option in unknown:
            raise errors.unknown_name("listen()", "option", option, ("host", "name", "placement", "sticky"))
        if self.state == CLOSED:
            raise server_errors.closed_server(self.name)
        if self.state != NEW:
            raise server_errors.already_listening(self.name, self._label())
        requested = parse(address, host)
        if name is not None and (not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME):
            raise errors.SettingError(
                f"name={name!r}: a server's name must be a string of 1 to {MAX_NAME} characters"
            )
        self._sticky = None if sticky is None else check_sticky(sticky, "listen(sticky=...)")
        if self._sticky not in (None, OFF) and placement in PLACEMENTS[1:]:
            raise server_errors.sticky_with_placement(self._sticky, placement)
        if isinstance(requested, Tcp):
            placement = settings.placement(requested.port, placement)
        self.placement = check_placement(placement)
        if isinstance(requested, Primary) and placement != "shared":
            raise server_errors.primary_with_placement(placement)
        # the master escapes the name too, so that both know the same one
        self._name = None if name is None else printable(name)
        self._requested = requested
        try:
            self._host.add(self)
        except BaseException:
            self._requested, self._name = None, None
            raise
        return self

    def close(self) -> None:
        """Stop accepting in this worker; open connections are finished. Harmless when repeated.

        The master closes the port after no worker has used it for the grace period.
        """
        if self.state != CLOSED:
            self._host.remove(self)
            self.state = CLOSED
            self._socket = None

    def set_socket(self, sock: ListenAddress | None, state: str) -> None:
        """Called by the registry when the server has its socket, or has lost it."""
        self._socket = sock
        self.state = state

    def use_grant(self, grant: AcceptGrant) -> None:
        """Called by the registry when the master lets this worker accept."""
        self.position, self.slot = grant.position, grant.slot
        self.set_socket(ListenAddress(_socket.socket(fileno=grant.fd), grant.sockname, grant.key), LISTENING)

    def _label(self) -> str:
        if self._socket is not None and self._socket.sockname is not None:
            return format_sockname(self._socket.sockname)
        return "nowhere" if self._requested is None else str(self._requested)

    @property
    def is_primary(self) -> bool:
        return isinstance(self._requested, Primary)


def default_name(app: object) -> str:
    """A name for an application: the same in every worker, so that equal servers find each other."""
    owner = app if hasattr(app, "__qualname__") else type(app)
    module = getattr(owner, "__module__", None) or ""
    own = str(getattr(app, "import_name", "") or getattr(app, "name", "") or "")
    text = f"{module}.{getattr(owner, '__qualname__', 'app')}"
    return printable(f"{text}({own})" if own and own.isprintable() else text)[:MAX_NAME]
