"""Running an unmodified script: ``gunicorn-passenger start server.py``.

Runs in: the master (the gunicorn application object) and a worker (the script).
Must never: run the script in the master.

The script's last line usually blocks (``serve_forever()``, ``app.run()``), so it runs in a greenlet of
its own. The worker goes on once a server of the script is installed on the primary socket.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import gevent
from gevent.event import Event
from gunicorn.app.wsgiapp import WSGIApplication
from gunicorn.errors import ConfigError

from gunicorn_passenger.errors import PassengerError, ScriptError
from gunicorn_passenger.serving import events
from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.serving.server import Server
from gunicorn_passenger.system import listening_sockets, runtime_dir

#: Seconds after which a script that runs without a primary is named in the log.
_PATIENCE = 10.0
#: Seconds within which a script that ends counts as one that cannot start.
_YOUNG = 5.0


class ScriptApplication(WSGIApplication):
    """gunicorn's application object for a script; gunicorn's options keep their meaning."""

    #: the UNIX socket where ``-b`` is left out, and why it cannot be had
    _default = ""
    _no_default: PassengerError | None = None

    def init(self, parser: Any, opts: Any, args: list[str]) -> dict[str, Any]:
        # args are what gunicorn's parser left over: "start", "server.py"
        if len(args) != 2:
            raise ConfigError(
                "one script is expected: gunicorn-passenger start server.py [gunicorn's options]"
            )
        # once: a reload comes with --chdir done
        self.script = getattr(self, "script", os.path.abspath(args[1]))
        self.app_uri = args[1]
        if not os.path.isfile(self.script):
            raise ConfigError(f"there is no script {args[1]!r}")
        registry.script = True
        name = os.path.splitext(os.path.basename(self.script))[0]
        try:
            directory, self._no_default = runtime_dir.ensure(), None
        except PassengerError as error:
            # -b may name another place, which is not known yet
            directory, self._no_default = runtime_dir.directory(), error
        self._default = os.path.join(directory, f"{name}.sock")
        # defaults: gunicorn's own sources of settings override them
        return {
            "default_proc_name": args[1],
            "worker_class": "gunicorn_passenger.Worker",
            "bind": [f"unix:{self._default}"],
        }

    def load_config(self) -> None:
        super().load_config()
        if self.cfg.preload_app:
            raise ConfigError(
                "--preload cannot go with gunicorn-passenger start: the script would run in the master; "
                "leave it out, or give gunicorn a module with an application"
            )
        worker = self.cfg.worker_class_str
        if "passenger" not in worker:
            raise ConfigError(
                f"gunicorn-passenger start needs its own worker class, not {worker!r}: leave -k out"
            )
        if self._no_default is not None and self._default in self.cfg.address:
            raise ConfigError(f"{self._no_default}; or say where to listen with -b")
        self._refuse_to_steal()

    def _refuse_to_steal(self) -> None:
        """gunicorn takes over a socket path that another application serves; say so instead."""
        if hasattr(self, "_checked") or "GUNICORN_PID" in os.environ:
            return
        self._checked = True
        for address in self.cfg.address:
            if (
                isinstance(address, str)
                and os.path.exists(address)
                and listening_sockets.has_listener(address)
            ):
                raise ConfigError(
                    f"unix:{address} is in use by a running application; stop it or choose another with -b"
                )

    def load(self) -> Any:
        if registry.worker is None:
            # --check-config: the script is not the master's to run
            with open(self.script, "rb") as file:
                compile(file.read(), self.script, "exec")
            return _nobody
        return run(self.script)


def run(path: str) -> Any:
    """Run a script until it has a primary server; it goes on beside the worker.

    :returns: a WSGI callable for gunicorn: the primary, where it is one of ours.
    :raises ScriptError: when it ends, or the worker is told to leave, before it has one.
    """
    installed = Event()
    registry.on_primary = installed.set
    name = os.path.basename(path)
    sys.argv = [path]
    sys.path.insert(0, os.path.dirname(path))
    _tame_werkzeug()
    _keep_signals()
    started = time.monotonic()
    before = set(threading.enumerate())
    script = gevent.spawn(_run, path)
    script.link(lambda _: None if _threads_beside(before) and script.value is None else installed.set())
    waited = 0.0
    while registry.worker.alive and not installed.wait(timeout=1.0):
        registry.worker.notify()
        if script.ready() and not _threads_beside(before):
            break
        waited += 1.0
        if waited == _PATIENCE:
            registry.log.warning(
                "%s runs but no server of it has become the primary: the web server is not answered", name
            )
    if registry.primary is None or (script.ready() and script.value is not None):
        raise _why_not(name, script)
    script.link(lambda ended: _ended(name, started, ended))
    return registry.primary if isinstance(registry.primary, Server) else _nobody


def _run(path: str) -> BaseException | None:
    """The script's greenlet; what ended it, if it did not end by itself."""
    # It stands for the main thread: threads that it starts are no daemons unless it says so. It is no
    # thread that the interpreter's end could wait for, though: gevent's shutdown would (Python 3.13).
    thread: Any = threading.current_thread()
    thread._daemonic = False
    threading._register_atexit(_make_daemon, thread)  # type: ignore[attr-defined]
    try:
        runpy.run_path(path, run_name="__main__")
    except gevent.GreenletExit:
        raise
    except BaseException as error:
        return error
    finally:
        _make_daemon(thread)
    return None


def _make_daemon(thread: Any) -> None:
    thread._daemonic = True


def _threads_beside(before: set[threading.Thread]) -> bool:
    """Whether the script has threads that plain Python would wait for at its end."""
    threads = set(threading.enumerate()) - before
    return any(not (thread.daemon or isinstance(thread, threading._DummyThread)) for thread in threads)


def _why_not(name: str, script: Any) -> BaseException:
    if not script.ready():
        return SystemExit(0)  # the worker is told to leave
    error = script.value
    if error is None:
        return ScriptError(
            f"{name} ended without listening: gunicorn-passenger start runs a script that starts a server, "
            "such as one whose last line is serve_forever() or app.run()"
        )
    if isinstance(error, SystemExit):
        if registry.last_error is not None:
            return registry.last_error
        return ScriptError(f"{name} exited (status {error.code!r}) before it served")
    return error  # type: ignore[no-any-return]


def _ended(name: str, started: float, script: Any) -> None:
    """The script is over although its server ran: as under plain Python, the process is over with it.

    One that fails as soon as it has started would do so for ever: that stops the start.
    """
    error = script.value
    worker = registry.worker
    if error is None or not worker.alive:
        return  # its server lives on in greenlets of its own
    if isinstance(error, PassengerError):
        worker.failure = error
    else:
        text = f"exited (status {error.code!r})" if isinstance(error, SystemExit) else f"failed: {error!r}"
        if not isinstance(error, SystemExit):
            registry.log.error("%s failed", name, exc_info=error)
        if time.monotonic() - started < _YOUNG:
            worker.failure = registry.last_error or ScriptError(f"{name} {text} as soon as it had started")
        else:
            registry.log.error("%s %s; the worker is replaced", name, text)
    worker.handle_exit(0, None)


def _nobody(_environ: Any, start_response: Any) -> list[bytes]:  # pragma: no cover
    """Stands where gunicorn wants a callable; an unmodified primary accepts by itself."""
    start_response("503 Service Unavailable", [("Content-Length", "0")])
    return []


def _keep_signals() -> None:
    """gunicorn's signals stay gunicorn's: the script's handler of one runs when the worker has drained.

    A handler such as ``lambda *_: server.shutdown()`` would otherwise end what gunicorn has begun.
    """
    gunicorns = set(registry.worker.SIGNALS)
    wanted: dict[int, Any] = {}
    really = signal.signal

    def note(number: int, handler: Any) -> Any:
        if number not in gunicorns:
            return really(number, handler)
        before = wanted.get(number, signal.SIG_DFL)
        wanted[number] = handler
        return before

    def told(_worker: Any) -> None:
        handler = wanted.get(signal.SIGTERM)
        if callable(handler):
            with suppress(SystemExit, KeyboardInterrupt):
                handler(signal.SIGTERM, None)

    signal.signal = note  # type: ignore[assignment]
    events.on("exit", told)


def _tame_werkzeug() -> None:
    """``app.run(debug=True)`` starts the script a second time, outside gunicorn; keep it inside."""
    from werkzeug import _reloader

    def run_with_reloader(main: Any, *_args: Any, **_options: Any) -> None:
        registry.log.warning("Werkzeug's reloader is left out under gunicorn; use gunicorn's own --reload")
        main()

    _reloader.run_with_reloader = run_with_reloader  # type: ignore[assignment]
