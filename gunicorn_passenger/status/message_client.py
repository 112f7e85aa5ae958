"""The messages of an application's workers, for a process that is not one of them.

Process: a daemon of ``spawn()``, a child of a worker, or a process of the same account from outside.
Never: wait for the master without a limit.

The process publishes by way of the master's control socket. What it receives, the workers put into a mailbox
of its own, which it reads in a thread; where gevent has patched the process, in a greenlet.
"""

from __future__ import annotations

import _socket
import os
import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.ipc import mailbox
from gunicorn_passenger.ipc.subscribers import Receive, Subscribers
from gunicorn_passenger.status import control_client


class MessageClient:
    """Publishes to the workers of one application, and receives their messages."""

    def __init__(self, app: str = "", on_end: Callable[[], object] = lambda: None) -> None:
        """
        :param app: the application's pid or name. By default it is the one that has started this process, or
            the only one that runs.
        :param on_end: called, in the thread that reads, when the application has ended.
        """
        self._app = app
        self._on_end = on_end
        self._instance: control_client.Instance | None = None
        self._subscribers = Subscribers()
        self._opening = threading.Lock()
        self._reads = False

    def publish(self, topic: str, data: bytes) -> None:
        """Send a message to all workers, and to the other processes that have subscribed.

        :raises PassengerError: when the application cannot be found or does not respond, or the message is
            too long.
        """
        if self._instance is not None:
            # not when it is slow: it may send the message yet
            with suppress(ConnectionError, FileNotFoundError):
                self._send(self._instance, topic, data)
                return
        # at first, and when the application was started again
        self._instance = control_client.own_application(self._app)
        try:
            self._send(self._instance, topic, data)
        except OSError as error:
            raise _no_response(self._instance, error) from None

    def _send(self, instance: control_client.Instance, topic: str, data: bytes) -> None:
        try:
            control_client.publish(instance.socket, topic, data)
        except (TimeoutError, PermissionError) as error:
            raise _no_response(instance, error) from None

    def subscribe(self, topic: str, receive: Receive) -> Subscribers:
        """Have the messages of a topic that are published from now on.

        :param receive: called with each message, in the thread that reads them.
        :returns: where to remove ``receive`` again.
        :raises PassengerError: as :meth:`publish`.
        """
        self._subscribers.add(topic, receive)
        try:
            with self._opening:
                if not self._reads:
                    self._open()
        except BaseException:
            self._subscribers.remove(topic, receive)
            raise
        return self._subscribers

    def _open(self) -> None:
        instance = control_client.own_application(self._app)
        try:
            connection, receiving = control_client.subscribe(instance.socket)
        except OSError as error:
            raise _no_response(instance, error) from None
        self._instance = instance
        reader = threading.Thread(
            target=self._read, args=(connection, receiving), name="gunicorn-passenger messages", daemon=True
        )
        reader.start()
        self._reads = True

    def _read(self, connection: socket.socket, receiving: _socket.socket) -> None:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        poll.register(receiving, select.POLLIN)
        try:
            while all(fd != connection.fileno() for fd, _ in poll.poll()):
                with suppress(BlockingIOError):
                    while True:
                        taken = mailbox.take(receiving)
                        if taken is None:
                            return
                        self._deliver(mailbox.unpack(*taken))
        finally:
            # the master has ended, or has closed the connection
            self._reads = False
            connection.close()
            receiving.close()
            self._on_end()

    def _deliver(self, packet: mailbox.Packet | None) -> None:
        if packet is not None:
            for fd in packet.fds:
                os.close(fd)
            self._subscribers.deliver(packet.name, packet.data)


def _no_response(instance: control_client.Instance, error: OSError) -> PassengerError:
    return PassengerError(f"the master with pid {instance.pid} did not respond ({error}); see its error log")
