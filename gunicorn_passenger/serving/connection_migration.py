"""Passes the idle connections of a draining worker to its siblings, and receives theirs.

Process: a worker, in its hub.
Never: let two workers read from one connection.

The worker has closed its listening sockets. It then offers the connections that wait for a request to the
siblings, some at a time. They are this worker's again when the master says that no sibling serves them; a
request that comes meanwhile waits in the connection.
"""

from __future__ import annotations

from functools import partial
from time import monotonic
from typing import Any

import gevent

from gunicorn_passenger import errors
from gunicorn_passenger.http.acceptor import Acceptor
from gunicorn_passenger.http.client_socket import adopt
from gunicorn_passenger.http.faults import report_fault
from gunicorn_passenger.ipc.messages import MAX_OFFERED
from gunicorn_passenger.serving.acceptor_table import AcceptorTable
from gunicorn_passenger.serving.acceptors import ListenerHandler
from gunicorn_passenger.serving.broker_client import AssignedConnection, BrokerClient

#: Seconds between two searches for connections to offer.
_OFFER_INTERVAL = 0.1
#: Seconds until the next offer after a rejected one.
_RETRY_DELAY = 0.5


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
            sock, _ = adopt(fd)
            found.append(AssignedConnection(partial(acceptor.attach, sock, addr, begun=True), sock.release))
        return found
