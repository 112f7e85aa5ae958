"""Clients of Socket.IO, which tests have speak to each other."""

import logging

import socketio

#: What the clients say of connections that tests break on purpose.
_UNHEARD = logging.getLogger("tests.chatters")
_UNHEARD.addHandler(logging.NullHandler())
_UNHEARD.propagate = False


class _Client(socketio.Client):
    """One whose every attempt to connect waits as long as the first one does.

    When it connects again, it gives up after a second, which a loaded machine may need. Then it waits for its
    poll to end, which python-engineio's server of asyncio does only at the next ping.
    """

    def connect(self, *arguments, wait_timeout=30, **options):
        super().connect(*arguments, wait_timeout=wait_timeout, **options)


class Chatter:
    """A client that connects again when it has lost its worker, and keeps what it hears."""

    def __init__(self, port, transports):
        self.news = []
        self.rooms = ["all"]
        # python-socketio takes a random part off the delay; with none left it connects again while the thread
        # of the lost connection still resets the client, which then stays without a session for ever
        self.client = _Client(
            reconnection_delay=0.2,
            reconnection_delay_max=0.4,
            randomization_factor=0.1,
            logger=_UNHEARD,
            engineio_logger=_UNHEARD,
        )
        self.client.on("news", self.news.append)
        self.client.on("question", lambda text: f"{text}!")
        self.client.connect(f"http://127.0.0.1:{port}", transports=transports, wait_timeout=30)

    def call(self, event, *arguments):
        return self.client.call(event, arguments if arguments else None, timeout=30)

    def whoami(self):
        """Its worker's pid, and its session; ``None`` while it connects again."""
        try:
            return tuple(self.client.call("whoami", timeout=2))
        except (socketio.exceptions.SocketIOError, ValueError):
            return None

    def state(self):
        """Where it stands, for a test that fails."""
        client, engine = self.client, self.client.eio
        return (
            f"{client.connection_transports}: connected {client.connected}, engine {engine.state} "
            f"by {engine.current_transport}, connecting again {client._reconnect_task is not None}"
        )
