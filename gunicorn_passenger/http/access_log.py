"""The access log: the values of a line, and how the line is written.

Process: a serving process.
Never: change what gunicorn's logger would write, except for characters that could forge a line or control a
terminal. :class:`EscapedAtoms` is the one place that escapes them; gunicorn's logger uses it, too.

gunicorn's logger computes every value that a format might contain (the "atoms"), environ and headers
included, and passes them to ``logging``. Here the format is read once, and only its own atoms are computed.
A logger that is not gunicorn's own gets all of them, and so do handlers that gunicorn has not set up.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from gunicorn.glogging import Logger, SafeAtoms

from gunicorn_passenger.system.text import printable

#: environ, response, request, seconds, head -> the value in the line
Atom = Callable[[dict[str, Any], Any, Any, float, bytes], Any]

_NAME = re.compile(r"%\(([^)]*)\)")


class _LogClock:
    """The time as the access log writes it, formatted once a second."""

    def __init__(self) -> None:
        self.second = 0
        self.text = ""

    def now(self) -> str:
        now = int(time.time())
        if now != self.second:
            self.second, self.text = now, time.strftime("[%d/%b/%Y:%H:%M:%S %z]", time.localtime(now))
        return self.text


def _escaped(value: Any) -> Any:
    return printable(value).replace('"', '\\"') if isinstance(value, str) else value


class EscapedAtoms(SafeAtoms):
    """gunicorn's atoms, with control characters escaped as well as quotes."""

    def __init__(self, atoms: dict[str, Any]) -> None:
        super().__init__({key: printable(v) if isinstance(v, str) else v for key, v in atoms.items()})


def _variable(name: str, default: Any = None) -> Atom:
    return lambda environ, resp, req, seconds, head: environ.get(name, default)


def _status(environ: dict[str, Any], resp: Any, req: Any, seconds: float, head: bytes) -> Any:
    return resp.status.split(None, 1)[0] if isinstance(resp.status, str) else resp.status


def _last(pairs: Any, name: str) -> Any:
    found = "-"
    for key, value in pairs:
        if key.lower() == name:
            found = value
    return found


def escape_access_log(log: Any) -> None:
    """Escape also the lines that gunicorn's logger itself writes: those of TLS, HTTP/2 and bad requests.

    :param log: gunicorn's logger; one that has its own wrapper class is not changed.
    """
    if getattr(log, "atoms_wrapper_class", None) is SafeAtoms:
        log.atoms_wrapper_class = EscapedAtoms


class AccessLog:
    """Writes one line for each request."""

    def __init__(self, cfg: Any, log: Any) -> None:
        self.cfg = cfg
        self._log = log
        self._now = _LogClock().now
        self._format = cfg.access_log_format
        #: whether there is an access log
        self.enabled = True
        #: whether the logger is gunicorn's own, unchanged: then its line can be formatted here
        self._simple = (
            type(log).access is Logger.access
            and type(log).atoms is Logger.atoms
            and type(log).now is Logger.now
            and getattr(log, "atoms_wrapper_class", None) in (SafeAtoms, EscapedAtoms)
            and isinstance(self._format, str)
            and not (cfg.logconfig or cfg.logconfig_dict or getattr(cfg, "logconfig_json", None))
        )
        if type(log).access is Logger.access:
            self.enabled = bool(
                cfg.accesslog
                or cfg.logconfig
                or cfg.logconfig_dict
                or getattr(cfg, "logconfig_json", None)
                or (cfg.syslog and not cfg.disable_redirect_access_to_syslog)
            )
        escape_access_log(log)
        if self._simple:
            self._atoms = {name: self._atom(name) for name in _NAME.findall(self._format)}
            self._simple = self._can_format()

    def write(self, resp: Any, req: Any, environ: dict[str, Any], seconds: float, head: bytes) -> None:
        """
        :param resp: the response.
        :param req: a function that returns gunicorn's request object.
        :param seconds: the duration of the request.
        :param head: the request's header section as it came.
        """
        if not self._simple:
            self._log.access(resp, req(), environ, timedelta(seconds=seconds))
            return
        atoms = {
            name: _escaped(atom(environ, resp, req, seconds, head)) for name, atom in self._atoms.items()
        }
        logger = self._log.access_log
        handlers = logger.handlers
        if (
            len(handlers) == 1
            and _is_plain(handlers[0])
            and not logger.filters
            and not logger.propagate
            and logger.isEnabledFor(logging.INFO)
        ):
            handler = handlers[0]
            try:
                line = self._format % atoms
                with handler.lock:
                    stream = handler.stream
                    stream.write(f"{line}\n")
                    stream.flush()
                return
            except Exception:  # noqa: S110 - logging itself reports a full disk or a closed stream
                pass
        logger.info(self._format, atoms)

    def _can_format(self) -> bool:
        """Whether the format works with our atoms. gunicorn's logger handles one that does not."""
        try:
            self._format % dict.fromkeys(self._atoms, 0)
        except Exception:
            return False
        return True

    def _atom(self, name: str) -> Atom:
        simple: dict[str, Atom] = {
            "h": _variable("REMOTE_ADDR", "-"),
            "l": lambda environ, resp, req, seconds, head: "-",
            "u": lambda environ, resp, req, seconds, head: self._user(environ),
            "t": lambda environ, resp, req, seconds, head: self._now(),
            "r": lambda environ, resp, req, seconds, head: (
                f"{environ['REQUEST_METHOD']} {environ['RAW_URI']} {environ['SERVER_PROTOCOL']}"
            ),
            "s": _status,
            "m": _variable("REQUEST_METHOD"),
            "U": _variable("PATH_INFO"),
            "q": _variable("QUERY_STRING"),
            "H": _variable("SERVER_PROTOCOL"),
            "b": lambda environ, resp, req, seconds, head: "-" if resp.sent is None else str(resp.sent),
            "B": lambda environ, resp, req, seconds, head: resp.sent,
            "f": _variable("HTTP_REFERER", "-"),
            "a": _variable("HTTP_USER_AGENT", "-"),
            "T": lambda environ, resp, req, seconds, head: int(seconds),
            "D": lambda environ, resp, req, seconds, head: round(seconds * 1000000),
            "M": lambda environ, resp, req, seconds, head: int(seconds * 1000),
            "L": lambda environ, resp, req, seconds, head: f"{seconds:.6f}",
            "p": lambda environ, resp, req, seconds, head: f"<{os.getpid()}>",
        }
        if name in simple:
            return simple[name]
        inner, kind = name[1:-2].lower(), name[-2:].lower()
        if name.startswith("{") and kind == "}i":
            return self._request_field(inner)
        if name.startswith("{") and kind == "}o":
            return lambda environ, resp, req, seconds, head: _last(resp.headers, inner)
        if name.startswith("{") and kind == "}e":
            return lambda environ, resp, req, seconds, head: next(
                (value for key, value in environ.items() if key.lower() == inner), "-"
            )
        return lambda environ, resp, req, seconds, head: "-"

    @staticmethod
    def _request_field(name: str) -> Atom:
        line = re.compile(rb"\r\n" + re.escape(name.encode()) + rb"[ \t]*:([^\r]*)", re.IGNORECASE)
        dropped = "_" in name

        def field(environ: dict[str, Any], resp: Any, req: Any, seconds: float, head: bytes) -> Any:
            # from the header section as it came: the application may have changed the environ
            if dropped:
                return _last(req().headers, name)
            found = line.findall(head)
            return found[-1].strip(b" \t").decode("latin-1") if found else "-"

        return field

    def _user(self, environ: dict[str, Any]) -> str:
        return self._log._get_user(environ) or "-" if "HTTP_AUTHORIZATION" in environ else "-"


def _is_plain(handler: Any) -> bool:
    """Whether gunicorn has set up this handler for its access log, and nothing has changed it."""
    return (
        (handler.__class__ is logging.FileHandler or handler.__class__ is logging.StreamHandler)
        and handler.stream is not None
        and not handler.filters
        and handler.level <= logging.INFO
        and handler.formatter.__class__ is logging.Formatter
        and handler.formatter._fmt == Logger.access_fmt
    )
