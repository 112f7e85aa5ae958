"""A WSGI application that runs in native threads, so that its blocking calls do not stop the server's hub.

Process: a worker of a class other than ours, where nothing has patched the program.
Never: let a thread of the application use a socket of the hub's. What the application does with the request
and the connection runs in the hub, while its thread waits.

One thread runs a request from the call to ``close()`` of the result, as frameworks with thread-locals and
context variables expect. It may be one chunk ahead of the client, and no more.
"""

from __future__ import annotations

import errno
from _queue import SimpleQueue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from gevent.event import Event
from gunicorn.http.wsgi import FileWrapper
from gunicorn.workers.base_async import ALREADY_HANDLED

from gunicorn_passenger.errors import ClientDisconnected
from gunicorn_passenger.http.body import EMPTY_BODY
from gunicorn_passenger.http.faults import report_fault
from gunicorn_passenger.serving.gevent_scheduler import GeventScheduler
from gunicorn_passenger.system import unpatched

#: The methods of a client's socket that an application which takes the connection over may call.
_SOCKET_METHODS = {
    "close",
    "fileno",
    "getpeername",
    "getsockname",
    "getsockopt",
    "gettimeout",
    "recv",
    "recv_into",
    "send",
    "sendall",
    "setblocking",
    "setsockopt",
    "settimeout",
    "shutdown",
}


class ThreadPool:
    """So many native threads, each of which starts when all others are busy."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._jobs: SimpleQueue[Callable[[], object]] = SimpleQueue()
        #: how many threads there are, and how many jobs are not finished; only the hub's thread starts jobs
        self._threads = 0
        self._unfinished: set[Callable[[], object]] = set()

    def run(self, job: Callable[[], object]) -> None:
        """Run a job, which must not raise. Called in the hub.

        :raises RuntimeError: when the system cannot start a thread.
        """
        if self._threads < min(len(self._unfinished) + 1, self._most):
            unpatched.start_thread(self._work)
            self._threads += 1
        self._unfinished.add(job)
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            job()
            self._unfinished.discard(job)
            del job  # it would keep the request until the next one


class ThreadedApplication:
    """A WSGI application for the hub, which runs the program's own in threads."""

    def __init__(self, app: Callable[..., Iterable[bytes]], threads: int) -> None:
        """Called in the hub of the server.

        :param threads: how many requests run at a time; others wait.
        """
        self.app = app
        self._pool = ThreadPool(threads)
        self._hub = GeventScheduler()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        call = _Call(self._hub, self.app, environ, start_response)
        self._pool.run(call.run_in_thread)
        return call.result()


class _Call:
    """One request: the response on its way from the application's thread to the hub."""

    def __init__(
        self,
        hub: GeventScheduler,
        app: Callable[..., Iterable[bytes]],
        environ: dict[str, Any],
        start_response: Callable[..., Any],
    ) -> None:
        self._hub = hub
        self._app = app
        self._environ = environ
        self._start_response = start_response
        #: what the thread has produced: a chunk, the whole result, an error, or ``None`` at the end
        self._produced: deque[tuple[str, Any]] = deque()
        self._changed = Event()
        #: held while a chunk waits for the hub
        self._room = unpatched.lock()
        self._abandoned = False
        #: whether the application has produced a part of the body
        self._begun = False
        body = environ["wsgi.input"]
        if body is not EMPTY_BODY:
            environ["wsgi.input"] = _HubFile(hub, body)
        environ["wsgi.early_hints"] = partial(_in_hub, hub, environ["wsgi.early_hints"])
        environ["gunicorn.socket"] = _HubSocket(hub, environ["gunicorn.socket"])

    # --- in the thread ----------------------------------------------------------------------------

    def run_in_thread(self) -> None:
        if self._abandoned:
            return
        try:
            result = self._app(self._environ, self._begin)
            if isinstance(result, list | tuple | FileWrapper) or result is ALREADY_HANDLED:
                self._produce("result", result)
                return
            try:
                for chunk in result:
                    self._put(chunk)
            finally:
                if hasattr(result, "close"):
                    result.close()
            self._produce("end", None)
        except BaseException as error:
            if not self._abandoned:
                self._produce("error", error)
            elif not isinstance(error, ClientDisconnected):
                report_fault("a response to a client that has disconnected", error)

    def _begin(self, status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], None]:
        """``start_response``.

        :raises BaseException: the application's error, when it comes after the status was sent (PEP 3333).
        """
        if exc_info and self._begun:
            raise exc_info[1].with_traceback(exc_info[2])
        self._start_response(status, headers, exc_info)
        return self._put

    def _put(self, chunk: bytes) -> None:
        """Wait until the hub has taken the chunk before this one.

        :raises ClientDisconnected: when the server takes no further chunk, each time.
        """
        if not self._abandoned:
            self._room.acquire()
        if self._abandoned:
            self._make_room()  # for other threads of the application
            raise ClientDisconnected(errno.EPIPE, "the client has disconnected")
        self._begun = self._begun or bool(chunk)
        self._produce("chunk", chunk)

    def _produce(self, kind: str, value: Any) -> None:
        self._produced.append((kind, value))
        self._hub.call_soon(self._changed.set)

    # --- in the hub -------------------------------------------------------------------------------

    def result(self) -> Any:
        """What the application returned, or an iterator over its chunks.

        :raises BaseException: what the application raised before the first chunk.
        """
        try:
            kind, value = self._next()
        except BaseException:
            self.close()
            raise
        if kind == "result":
            return value
        if kind == "error":
            raise value
        self._produced.appendleft((kind, value))
        return _Chunks(self)

    def _next(self) -> tuple[str, Any]:
        while not self._produced:
            self._changed.clear()
            self._changed.wait()
        return self._produced.popleft()

    def chunks(self) -> Iterator[bytes]:
        while True:
            kind, value = self._next()
            if kind == "chunk":
                self._make_room()
                yield value
            elif kind == "result":  # after write()
                yield from value
                return
            elif kind == "error":
                raise value
            else:
                return

    def _make_room(self) -> None:
        with suppress(RuntimeError):  # the application waits for none
            self._room.release()

    def close(self) -> None:
        """The server takes no further chunk."""
        self._abandoned = True
        self._make_room()


class _Chunks:
    """The body of a response, as the server iterates over it."""

    def __init__(self, call: _Call) -> None:
        self._chunks = call.chunks()
        self.close = call.close

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks


def _in_hub(hub: GeventScheduler, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return hub.run(partial(function, *arguments, **named))


class _HubFile:
    """``wsgi.input``, whose reads wait in the hub."""

    def __init__(self, hub: GeventScheduler, file: Any) -> None:
        self.read = partial(_in_hub, hub, file.read)
        self.readline = partial(_in_hub, hub, file.readline)
        self.readlines = partial(_in_hub, hub, file.readlines)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")


class _HubSocket:
    """``gunicorn.socket``, whose calls wait in the hub."""

    def __init__(self, hub: GeventScheduler, sock: Any) -> None:
        self._hub = hub
        self._sock = sock

    def __getattr__(self, name: str) -> Any:
        if name not in _SOCKET_METHODS:
            raise AttributeError(
                f"gunicorn.socket has no attribute {name!r} in a thread of a server of gunicorn-passenger"
            )
        return partial(_in_hub, self._hub, getattr(self._sock, name))
