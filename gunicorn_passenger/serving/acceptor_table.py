"""The acceptors of this process: those of the primary, one for each other server, and those that drain.

Process: a worker, or plain Python.
Never: know why a server starts or stops accepting; :mod:`.registry` decides that. Never import gevent
before there is a server of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, Any

from gunicorn_passenger.config.address import format_sockname
from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.config.settings import OFF
from gunicorn_passenger.ipc.accept_balance import AcceptBalance
from gunicorn_passenger.ipc.scoreboard import Scoreboard
from gunicorn_passenger.serving.asgi_server import AsgiServer
from gunicorn_passenger.serving.counters import AcceptorCounters
from gunicorn_passenger.serving.scheduler import Scheduler
from gunicorn_passenger.serving.server import Server

if TYPE_CHECKING:
    from gunicorn_passenger.ipc.connection_table import Seat
    from gunicorn_passenger.serving.acceptors import ListenerHandler
    from gunicorn_passenger.serving.asgi_thread import AsgiThread
    from gunicorn_passenger.serving.engineio_sessions import EngineIOSessions
    from gunicorn_passenger.serving.mailboxes import Mailboxes


class AcceptorTable:
    """Starts, finds and stops the acceptors of this process."""

    def __init__(self) -> None:
        self.counters = AcceptorCounters()
        #: this worker's mailbox and its siblings'; ``None`` without a master
        self.mailboxes: Mailboxes | None = None
        #: those of the Socket.IO servers of this worker
        self.sessions: list[EngineIOSessions] = []
        #: whether all acceptors were told to stop
        self.stopped = False
        #: the acceptors of the primary's listeners
        self.primary: list[ListenerHandler] = []
        self._by_server: dict[Server, ListenerHandler] = {}
        #: acceptors of servers that closed or paused, whose connections are not finished
        self._draining: list[ListenerHandler] = []
        #: the threads of ASGI applications
        self._applications: list[AsgiThread] = []
        #: the worker's place in the table that its siblings read
        self.seat: Seat | None = None
        self._balances: dict[int, AcceptBalance] = {}
        self._cfg: Any = None
        self._log: Any = None
        self._worker: Any = None
        self._is_patched = True

    def configure(self, cfg: Any, log: Log, worker: Any, is_patched: bool) -> None:
        """
        :param cfg: gunicorn's configuration.
        :param worker: gunicorn's worker object.
        :param is_patched: whether gevent has patched the program, so that its blocking calls let the hub run.
        """
        self._cfg, self._log, self._worker, self._is_patched = cfg, log, worker, is_patched

    def configuration(self) -> tuple[Any, Any]:
        """gunicorn's configuration and log; under plain Python its defaults."""
        if self._cfg is None:
            # under gunicorn the module is there already; plain Python needs it for a server that listens
            from gunicorn.config import Config

            self._cfg = Config()
            self._log = self._cfg.logger_class(self._cfg)
        return self._cfg, self._log

    def write_counts(self, scoreboard: Scoreboard) -> None:
        """Bring the worker's page of the scoreboard up to date. Called once a second, and at the end."""
        self.counters.write(scoreboard)
        if self.mailboxes is not None:
            sessions = sum(each.count() for each in self.sessions)
            scoreboard.write_mailbox(self.mailboxes.counts()._replace(sessions=sessions))

    # --- one acceptor -----------------------------------------------------------------------------

    def start_primary(self, sock: Any, app: Any, cfg: Any, slot: int, sticky: object) -> None:
        """Accept on a listener of the primary.

        :param cfg: gunicorn's own configuration.
        :param sticky: see :meth:`.server.Server.listen`.
        """
        acceptor = self._make(slot, sock, app, cfg)
        self._make_sticky(acceptor, sticky, _primary_key(acceptor), cfg)
        self.primary.append(acceptor)
        acceptor.start()

    def start(self, server: Server, sock: Any) -> None:
        """Accept on the listening socket of a server."""
        cfg, _ = self.configuration()
        if isinstance(server, AsgiServer):
            assert server.thread is not None
            asgi_acceptor = server.thread.make_acceptor(sock)
            self.counters.register(server.slot, asgi_acceptor)
            self._by_server[server] = asgi_acceptor
            if server.lease is not None and server.placement == "shared":
                self._make_sticky(asgi_acceptor, server.sticky, server.lease.key, cfg)
            asgi_acceptor.start()
            return
        app = server.app
        if server.threads and not self._is_patched:
            from gunicorn_passenger.serving.threaded_app import ThreadedApplication

            app = ThreadedApplication(app, server.threads)
        acceptor = self._make(server.slot, sock, app, cfg, is_primary=False)
        if server.lease is not None and server.placement == "shared":
            self._make_sticky(acceptor, server.sticky, server.lease.key, cfg)
        self._by_server[server] = acceptor
        acceptor.start()

    def _make(self, slot: int, sock: Any, app: Any, cfg: Any, is_primary: bool = True) -> ListenerHandler:
        from gunicorn_passenger.serving.acceptors import make_acceptor, secondary_config

        cfg = cfg if is_primary else secondary_config(cfg)
        balance = self._balances.setdefault(slot, AcceptBalance(self.seat, slot))
        acceptor = make_acceptor(sock, app, cfg, self._log, self._worker, balance)
        self.counters.register(slot, acceptor)
        return acceptor

    def start_application(self, server: AsgiServer, scheduler: Scheduler) -> None:
        """Start the thread of an ASGI application.

        :raises errors.PassengerError: when it does not start.
        """
        from gunicorn_passenger.serving.asgi_thread import AsgiThread

        cfg, log = self.configuration()
        on_death = None if self._worker is None else self._worker.retire
        app, name = server.asgi_app, server.name
        thread = AsgiThread(app, name, cfg, log, scheduler, on_death, self._sessions_are_ending)
        # before it starts: a drain that begins meanwhile ends it, too
        self._applications = [*(a for a in self._applications if not a.finished), thread]
        thread.start()
        server.thread = thread

    def open_mailbox(self, sticky: object) -> None:
        """Have the mailbox that a sticky server needs, before it accepts: this may wait for the master."""
        if self.mailboxes is not None and sticky not in (None, OFF):
            self.mailboxes.open()

    def leave_mailbox(self) -> None:
        """Take the connections that siblings have passed until now, and no more."""
        if self.mailboxes is not None:
            self.mailboxes.leave()

    def _make_sticky(self, acceptor: ListenerHandler, sticky: object, key: str, cfg: Any) -> None:
        """Have the acceptor pass the connections of requests that belong to siblings."""
        if self.mailboxes is not None and sticky not in (None, OFF):
            from gunicorn_passenger.serving import stickiness

            stickiness.install(acceptor, sticky, self.mailboxes, key, cfg, self._log)

    def stop(self, server: Server) -> None:
        """Close the listening socket of a server; its open connections continue."""
        acceptor = self._by_server.pop(server, None)
        if acceptor is not None:
            acceptor.stop_accepting()
            self._draining = [a for a in (*self._draining, acceptor) if not a.idle()]
        elif server.socket is not None and server.socket.sock is not None:
            server.socket.sock.close()

    def __contains__(self, server: object) -> bool:
        return server in self._by_server

    # --- all of them ------------------------------------------------------------------------------

    def stop_primary(self) -> None:
        """Close the listening sockets of the primary; its open connections continue."""
        for acceptor in self.primary:
            acceptor.stop_accepting()

    def stop_primary_at(self, key: str) -> None:
        """Close one listening socket of the primary; its open connections continue.

        :param key: its name, as :func:`.format_sockname` gives it.
        """
        for acceptor in [a for a in self.primary if format_sockname(a.sockname) == key]:
            self.primary.remove(acceptor)
            acceptor.stop_accepting()
            self._draining.append(acceptor)

    def stop_all(self) -> Iterable[Server]:
        """Close all listening sockets; open connections continue.

        :returns: the servers beside the primary that accepted until now.
        """
        self.stopped = True
        self.stop_primary()
        for acceptor in self._by_server.values():
            acceptor.stop_accepting()
        return list(self._by_server)

    def finish(self) -> None:
        """End the Socket.IO sessions of clients that poll, and ASGI applications when their connections end.

        Called when all acceptors have stopped, and siblings begin the sessions that clients open.
        """
        for each in self.sessions:
            each.end()
        for application in self._applications:
            application.finish()

    def _sessions_are_ending(self) -> bool:
        return any(each.are_ending() for each in self.sessions)

    def leave_to_parent(self) -> None:
        """In a forked child of the worker: all listening sockets and connections are the worker's."""
        for acceptor in self._all():
            acceptor.leave_to_parent()
        for application in self._applications:
            application.leave_to_parent()

    def idle(self) -> bool:
        """Whether no acceptor has a connection, and all that was to end has ended: applications, sessions."""
        return (
            all(acceptor.idle() for acceptor in self._all())
            and all(application.idle() for application in self._applications)
            and not self._sessions_are_ending()
        )

    def has_applications(self) -> bool:
        """Whether an ASGI application runs."""
        return not all(application.finished for application in self._applications)

    def kill(self, timeout: float) -> None:
        """End the connections that are left.

        :param timeout: seconds that they may take, and then as many for the ASGI applications to end.
        """
        deadline = monotonic() + timeout
        for acceptor in self._all():
            acceptor.kill(max(deadline - monotonic(), 0.0))
        for application in self._applications:
            application.finish()
        deadline = monotonic() + timeout
        for application in self._applications:
            application.kill(max(deadline - monotonic(), 0.0))
        deadline = monotonic() + timeout
        for application in self._applications:
            application.wait(max(deadline - monotonic(), 0.0))

    def by_key(self) -> list[tuple[str, ListenerHandler]]:
        """The acceptors by the key under which all workers know their port."""
        found = [(_primary_key(acceptor), acceptor) for acceptor in self.primary]
        return found + [(s.lease.key, a) for s, a in self._by_server.items() if s.lease is not None]

    def _all(self) -> Iterator[ListenerHandler]:
        yield from self.primary
        yield from self._by_server.values()
        yield from self._draining


def _primary_key(acceptor: ListenerHandler) -> str:
    return f"primary {format_sockname(acceptor.sockname)}"
