"""Clients of Socket.IO, which tests have speak to each other."""

import collections
import logging
import sys
import threading
import traceback

import socketio


class _LastWords(logging.Handler):
    """Keeps what a client has logged last; a test that breaks its connections on purpose shows it when it fails."""

    def __init__(self):
        super().__init__()
        self.lines = collections.deque(maxlen=40)
        self.setFormatter(logging.Formatter("%(asctime)s %(threadName)s %(message).200s"))

    def emit(self, record):
        self.lines.append(self.format(record))


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
        log = logging.Logger("tests.chatters", logging.INFO)
        self._said = _LastWords()
        log.addHandler(self._said)
        self.client = _Client(
            reconnection_delay=0.2,
            reconnection_delay_max=0.4,
            randomization_factor=0.1,
            logger=log,
            engineio_logger=log,
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

    def last_words(self):
        """What it did last, and where its threads are."""
        threads = (
            self.client._reconnect_task,
            self.client.eio.read_loop_task,
            self.client.eio.write_loop_task,
        )
        frames = sys._current_frames()
        stacks = [
            "".join([f"{thread.name}\n", *traceback.format_stack(frames[thread.ident])])
            for thread in threads
            if isinstance(thread, threading.Thread) and thread.ident in frames
        ]
        return "\n".join([*self._said.lines, *stacks])
