"""Graceful drain: a worker that exits finishes its connections, or lets siblings have them.

Process: a worker; under plain Python only the wait for the last connection.
Never: ends a connection before the graceful timeout, or lets two workers read from one connection.

The worker has closed its listening sockets. It then offers the connections that wait for a request to the
siblings, some at a time. They are this worker's again when the master says that no sibling serves them; a
request that comes meanwhile waits in the connection.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, Protocol

import gevent

from gunicorn_passenger import errors
from gunicorn_passenger.http.acceptor import Acceptor
from gunicorn_passenger.http.client_socket import ClientSocket
from gunicorn_passenger.http.faults import report_fault
from gunicorn_passenger.ipc.messages import MAX_OFFERED
from gunicorn_passenger.serving.acceptor_table import AcceptorTable
from gunicorn_passenger.serving.acceptors import ListenerHandler
from gunicorn_passenger.serving.broker_client import AssignedConnection, BrokerClient

#: Seconds between two looks for connections to offer.
_OFFER_INTERVAL = 0.1
#: Seconds until the next offer after a rejected one.
_RETRY_DELAY = 0.5
#: Seconds between two looks for idle connections of third-party servers.
_IDLE_CHECK_INTERVAL = 0.5
#: Seconds between two looks whether all connections are finished.
_POLL_INTERVAL = 0.1
#: Seconds that the connections which the graceful timeout ends may take to clean up.
_KILL_TIMEOUT = 1.0


class Drainable(Protocol):
    """Servers whose connections a drain finishes."""

    def idle(self) -> bool:
        """Whether no connection is open."""

    def kill(self, timeout: float) -> None:
        """End the connections that are left, within so many seconds."""


class ThirdPartyDrainable(Protocol):
    """Third-party servers, whose connections can be counted, and ended while they are idle."""

    def idle(self) -> bool:
        """Whether no connection is open."""

    def shutdown_idle_connections(self) -> None:
        """End the connections that wait for a request."""


class ConnectionMigration:
    """Offers this worker's idle connections to siblings, and receives theirs."""

    def __init__(self, broker: BrokerClient, acceptors: AcceptorTable) -> None:
        self._broker = broker
        self._acceptors = acceptors
        #: whether connections are on their way to a sibling
        self.in_flight = False
        #: connections of which it is unknown whether a sibling serves them; this worker must not read them
        self._unresolved: list[Any] = []

    def migrate_idle_connections(self, seconds: float) -> None:
        """Offer connections that wait for a request. Runs in a greenlet of its own, until it is killed.

        :param seconds: for how long. Each offer that is rejected restarts the idle timeout of its connection,
            so the offers must end.
        """
        deadline = monotonic() + seconds
        retry_at: dict[str, float] = {}
        while monotonic() < deadline:
            for key, acceptor in self._acceptors.by_key():
                while self._broker.successor_ready and monotonic() >= retry_at.get(key, 0.0):
                    if not self._offer(key, acceptor):
                        retry_at[key] = monotonic() + _RETRY_DELAY
            gevent.sleep(_OFFER_INTERVAL)

    def _offer(self, key: str, acceptor: ListenerHandler) -> bool:
        """:returns: false when no connection waits for a request, or no sibling takes any."""
        idle = acceptor.pop_idle_connections(MAX_OFFERED)
        if not idle:
            return False
        try:
            self.in_flight = True
            addrs, fds = [addr for _, addr in idle], [sock.fileno() for sock, _ in idle]
            taken = self._broker.offer_connections(key, addrs, fds)
        except errors.BrokerUnavailable:
            # siblings may serve them: they must not be read here again
            self._broker.successor_ready = False
            self._unresolved.extend(sock for sock, _ in idle)
            return False
        finally:
            self.in_flight = False
        for position, (sock, addr) in enumerate(idle):
            if taken >> position & 1:
                sock.release()
                continue
            try:
                acceptor.attach(sock, addr, begun=True)
            except Exception as error:
                report_fault("a connection that no other worker took was closed", error)
        return taken != 0

    def receive_connections(self, key: str, addrs: list[Any], fds: list[int]) -> list[AssignedConnection]:
        """Take connections that a sibling offers.

        :param key: of the sibling's server.
        :param fds: the connections; the returned ones own theirs.
        :returns: the first of them, as many as this worker can serve.
        """
        acceptor = next((a for known, a in self._acceptors.by_key() if known == key), None)
        if self._acceptors.stopped or not isinstance(acceptor, Acceptor):
            return []
        found = []
        for addr, fd in list(zip(addrs, fds, strict=True))[: acceptor.room()]:
            with socket.socket(fileno=os.dup(fd)) as probe:
                family, proto = probe.family, probe.proto
            os.set_blocking(fd, False)
            sock = ClientSocket(family, socket.SOCK_STREAM, proto, fd)
            found.append(AssignedConnection(partial(acceptor.attach, sock, addr, begun=True), sock.release))
        return found


def finish_connections(
    servers: Drainable,
    seconds: float,
    log: Any,
    on_tick: Callable[[], object] = lambda: None,
    third_party: ThirdPartyDrainable | None = None,
    keepalive: float = 0.0,
) -> None:
    """Wait until no connection is open; end those that are left after the graceful timeout.

    :param seconds: what is left of the graceful timeout.
    :param on_tick: called in each round of the wait.
    :param third_party: its idle connections are ended after the keep-alive time, since no sibling takes them.
    :param keepalive: seconds.
    """
    now = monotonic()
    deadline, idle_check_at = now + seconds, now + keepalive
    while not (servers.idle() and (third_party is None or third_party.idle())):
        if monotonic() >= deadline:
            log.warning(
                "Worker graceful timeout (pid:%s): the connections that are still open are closed; raise "
                "--graceful-timeout if requests may take longer",
                os.getpid(),
            )
            servers.kill(_KILL_TIMEOUT)
            return
        on_tick()
        if third_party is not None and monotonic() >= idle_check_at and not third_party.idle():
            third_party.shutdown_idle_connections()
            idle_check_at = monotonic() + _IDLE_CHECK_INTERVAL
        gevent.sleep(_POLL_INTERVAL)
