"""Runs an unmodified script under gunicorn: ``gunicorn-passenger start server.py``.

Process: the master (the gunicorn application object) and a worker (the script).
Never: run the script in the master.

The script's last line usually blocks (``serve_forever()``, ``app.run()``), so the script runs in a greenlet
of its own. The worker's start continues as soon as a server of the script is installed on the primary socket.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import gevent
from gevent.event import Event
from gunicorn.app.wsgiapp import WSGIApplication
from gunicorn.config import Setting, validate_pos_int
from gunicorn.errors import ConfigError

from gunicorn_passenger.arbiter import fork_handlers
from gunicorn_passenger.errors import PassengerError, ScriptError
from gunicorn_passenger.serving import events
from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.serving.server import Server
from gunicorn_passenger.system import listening_sockets, runtime_dir

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from _typeshed.wsgi import WSGIApplication as WSGIApplicationType

#: Seconds after which the log warns of a script that runs without a primary.
_WARN_AFTER = 10.0
#: Seconds within which a script that fails stops gunicorn, instead of being restarted forever.
_STARTUP_SECONDS = 5.0


class PrimaryPort(Setting):
    """``--primary``; gunicorn's parser knows it once this module is imported."""

    name = "script_primary"
    section = "gunicorn-passenger start"
    cli = ("--primary",)
    meta = "PORT"
    validator = staticmethod(validate_pos_int)
    type = int
    default = 0
    desc = """The server that listens on this port becomes the primary; the others get ports of their own."""


class ScriptApplication(WSGIApplication):
    """gunicorn's application object for a script; gunicorn's options keep their meaning."""

    #: the path of the UNIX socket for a start without ``-b``, and the error if it cannot be used
    _default = ""
    _default_error: PassengerError | None = None

    def init(self, parser: Any, opts: Any, args: list[str]) -> dict[str, Any]:
        # args are what gunicorn's parser left over: "start", "server.py"
        if len(args) != 2:
            raise ConfigError("name one script: gunicorn-passenger start server.py [gunicorn's options]")
        # only once: before a reload, --chdir has changed the directory
        self.script = getattr(self, "script", os.path.abspath(args[1]))
        self.app_uri = args[1]
        if not os.path.isfile(self.script):
            raise ConfigError(f"the script {args[1]!r} does not exist or is not a file")
        registry.script = True
        name = os.path.splitext(os.path.basename(self.script))[0]
        try:
            directory, self._default_error = runtime_dir.ensure(), None
        except PassengerError as error:
            # -b, which is not parsed yet, may name another path
            directory, self._default_error = runtime_dir.directory(), error
        self._default = os.path.join(directory, f"{name}.sock")
        # only defaults: gunicorn's configuration file and command line override them
        return {
            "default_proc_name": args[1],
            "worker_class": "gunicorn_passenger.Worker",
            "bind": [f"unix:{self._default}"],
        }

    def load_config(self) -> None:
        super().load_config()
        if self.cfg.preload_app:
            raise ConfigError(
                "--preload does not work with gunicorn-passenger start, because the script would run in the "
                "master: leave it out, or start gunicorn with a module that has an application"
            )
        registry.script_primary = self.cfg.script_primary
        worker = self.cfg.worker_class_str
        if "passenger" not in worker:
            raise ConfigError(
                f"gunicorn-passenger start needs its own worker class instead of {worker!r}: leave -k out"
            )
        if self._default_error is not None and self._default in self.cfg.address:
            raise ConfigError(f"{self._default_error}; or name another address with -b")
        self._refuse_socket_in_use()

    def _refuse_socket_in_use(self) -> None:
        """Refuse a socket path that another application serves; gunicorn would take it over."""
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
                    f"unix:{address} is in use by a running application; stop that or choose another path "
                    "with -b"
                )

    def load(self) -> WSGIApplicationType:
        if registry.worker is None:
            # --check-config: the master must not run the script
            with open(self.script, "rb") as file:
                compile(file.read(), self.script, "exec")
            return _unavailable
        return run(self.script)


def run(path: str) -> WSGIApplicationType:
    """Run a script until it has a primary server; it continues in its greenlet.

    :returns: a WSGI callable for gunicorn: the primary, where it is one of our servers.
    :raises ScriptError: when the script ends, or gunicorn stops the worker, before that.
    """
    installed = Event()
    registry.on_primary = installed.set
    name = os.path.basename(path)
    sys.argv = [path]
    sys.path.insert(0, os.path.dirname(path))
    _disable_werkzeug_reloader()
    _defer_signal_handlers()
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
        if waited == _WARN_AFTER:
            registry.log.warning(
                "%s runs, but it has no server on the primary socket yet, so the web server gets no "
                "response: the script must start a server. If it starts several, one of them must call "
                "listen('passenger')",
                name,
            )
    if registry.primary is None or (script.ready() and script.value is not None):
        raise _start_error(name, script)
    script.link(lambda ended: _on_script_end(name, started, ended))
    return registry.primary if isinstance(registry.primary, Server) else _unavailable


def _run(path: str) -> BaseException | None:
    """The script's greenlet; returns the error that ended the script, if one did."""
    # It stands in for the main thread: threads that the script starts are not daemons by default. But the
    # interpreter must not wait for it at its end, as gevent's shutdown would (Python 3.13).
    fork_handlers.load_in_this_greenlet()
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


def _start_error(name: str, script: Any) -> BaseException:
    if not script.ready() or fork_handlers.stop_requested():
        return SystemExit(0)  # gunicorn stops the worker
    error = script.value
    if error is None:
        return ScriptError(
            f"{name} ended without listening: gunicorn-passenger start needs a script that starts a server, "
            "for instance one whose last line is serve_forever() or app.run()"
        )
    if isinstance(error, SystemExit):
        if registry.last_error is not None:
            return registry.last_error
        return ScriptError(
            f"{name} exited (status {error.code!r}) before it had a server; its own output says why"
        )
    return error  # type: ignore[no-any-return]


def _on_script_end(name: str, started: float, script: Any) -> None:
    """The script has ended after its server had started: the process ends with it, as under plain Python.

    A script that fails at once would fail in every new worker, so that stops gunicorn.
    """
    error = script.value
    worker = registry.worker
    if error is None or not worker.alive or fork_handlers.stop_requested():
        return  # its server runs in greenlets of its own, or gunicorn stops the worker
    if isinstance(error, PassengerError):
        worker.failure = error
    else:
        text = f"exited (status {error.code!r})" if isinstance(error, SystemExit) else f"failed: {error!r}"
        if not isinstance(error, SystemExit):
            registry.log.error("%s failed with an error", name, exc_info=error)
        if time.monotonic() - started < _STARTUP_SECONDS:
            worker.failure = registry.last_error or ScriptError(
                f"{name} {text} less than {_STARTUP_SECONDS:g} s after its start"
            )
        else:
            registry.log.error("%s %s; the worker exits and gunicorn starts another", name, text)
    worker.handle_exit(0, None)


def _unavailable(_environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:  # pragma: no cover
    """The callable that gunicorn requires, and never calls: an unmodified primary accepts by itself."""
    start_response("503 Service Unavailable", [("Content-Length", "0")])
    return []


def _defer_signal_handlers() -> None:
    """Keep gunicorn's signal handlers; the script's handler of SIGTERM runs when the worker has drained.

    A handler such as ``lambda *_: server.shutdown()`` would otherwise interrupt the drain.
    """
    reserved = set(registry.worker.SIGNALS)
    deferred: dict[int, Any] = {}
    set_handler = signal.signal

    def set_or_defer(number: int, handler: Any) -> Any:
        if number not in reserved:
            return set_handler(number, handler)
        before = deferred.get(number, signal.SIG_DFL)
        deferred[number] = handler
        return before

    def on_exit(_worker: Any) -> None:
        handler = deferred.get(signal.SIGTERM)
        if callable(handler):
            with suppress(SystemExit, KeyboardInterrupt):
                handler(signal.SIGTERM, None)

    signal.signal = set_or_defer  # type: ignore[assignment]
    events.on("exit", on_exit)


def _disable_werkzeug_reloader() -> None:
    """Have ``app.run(debug=True)`` run the script here; Werkzeug would start it again outside gunicorn."""
    from werkzeug import _reloader

    def run_with_reloader(main: Any, *_args: Any, **_options: Any) -> None:
        registry.log.warning("Werkzeug's reloader is disabled under gunicorn; use gunicorn's own --reload")
        main()

    _reloader.run_with_reloader = run_with_reloader  # type: ignore[assignment]
