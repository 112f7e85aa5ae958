"""The errors of a program's servers: how it made them, and what the master could not do for them.

Process: a worker and the master. Never: raise; a function here returns the error to raise.

Each text is one line and says what happened, where, and what to do.
"""

from __future__ import annotations

import errno
import os

from gunicorn_passenger.errors import (
    AlreadyInstalled,
    BrokerUnavailable,
    ListenError,
    NotCallable,
    PassengerError,
    SettingError,
)
from gunicorn_passenger.system.callers import is_program_file


def primary_with_placement(placement: str) -> SettingError:
    return SettingError(
        f"placement {placement!r} is not for the primary, which all workers serve; "
        "leave placement out, or listen on a separate port and put a proxy in front of it"
    )


def sticky_with_placement(sticky: object, placement: str) -> SettingError:
    return SettingError(
        f"listen(sticky={sticky!r}) is for the placement 'shared': with {placement!r} one worker serves all "
        "requests to the port; leave sticky out, or placement"
    )


def unknown_name(name: str) -> PassengerError:
    return PassengerError(
        f"this application has no server or daemon {name!r}; 'gunicorn-passenger status' lists them"
    )


def closed_server(name: str) -> ListenError:
    return ListenError(
        errno.EBADF, f"server {name!r} is closed and cannot listen again; make a new one with create_server()"
    )


def already_listening(name: str, address: str) -> ListenError:
    return ListenError(
        errno.EINVAL,
        f"server {name!r} already listens on {address}; to move it, call close() and make a new server",
    )


def name_taken(name: str, address: str) -> ListenError:
    return ListenError(
        errno.EINVAL, f"a server named {name!r} already listens on {address}; give each server its own name"
    )


def once_twice(name: str) -> SettingError:
    return SettingError(f"once({name!r}) was called twice in this worker; give each function its own name")


def hooks_missing(worker_class: str) -> ListenError:
    return ListenError(
        errno.EINVAL,
        f"this gunicorn runs the worker class {worker_class!r} without the hooks that listen() needs: add "
        "the line 'from gunicorn_passenger.hooks import *' to gunicorn.conf.py or, without such a file, "
        "start gunicorn with -c python:gunicorn_passenger.hooks; or use -k gunicorn_passenger.Worker",
    )


def primary_elsewhere(worker_class: str) -> ListenError:
    return ListenError(
        errno.EINVAL,
        f"listen('passenger') needs -k gunicorn_passenger.Worker: under the worker class {worker_class!r} "
        "gunicorn serves the primary itself, with the application that its command line names; listen on a "
        "port instead, or name this server there",
    )


def channel_in_master() -> PassengerError:
    return PassengerError(
        "a channel cannot be used in gunicorn's master, which serves no clients: publish and subscribe in a "
        "worker (in a request, or in a handler of passenger.on('ready')), or give channel(...).on() a "
        "function, which waits for the worker"
    )


def channel_without_master() -> PassengerError:
    return PassengerError(
        "this process cannot reach the master that has started it, which a channel needs: both must run as "
        "the same user, and the application under gunicorn; 'gunicorn-passenger status' shows whether the "
        "master can be reached"
    )


def channel_without_hooks(worker_class: str) -> PassengerError:
    return PassengerError(
        f"this gunicorn runs the worker class {worker_class!r} without the hooks that a channel needs: add "
        "the line 'from gunicorn_passenger.hooks import *' to gunicorn.conf.py or, without such a file, "
        "start gunicorn with -c python:gunicorn_passenger.hooks; or use -k gunicorn_passenger.Worker"
    )


def program_line(error: BaseException) -> str:
    """The line of the program that an error comes from, such as ``app.py:3``; empty when no line is known."""
    where, traceback = "", error.__traceback__
    while traceback is not None:
        path = traceback.tb_frame.f_code.co_filename
        if is_program_file(path):
            where = f"{os.path.relpath(path)}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return where


def with_program_line(error: BaseException) -> str:
    """An error as one line, with the line of the program that it comes from, where there is one."""
    text = str(error) if isinstance(error, PassengerError) else f"{type(error).__name__}: {error}"
    where = program_line(error)
    return " ".join(f"{text} ({where})".split()) if where else " ".join(text.split())


def not_callable(app: object) -> NotCallable:
    return NotCallable(
        f"create_server() takes a WSGI or an ASGI application, which is callable; {app!r} is "
        "not: pass a function app(environ, start_response) or a framework's application object"
    )


def server_name_too_long(name: str, limit: int) -> ListenError:
    return ListenError(
        errno.EINVAL,
        f"the server name {name[:40]!r}... has {len(name)} characters, but {limit} are allowed; give the "
        "server a shorter name with listen(..., name=...)",
    )


def no_descriptor(address: str) -> ListenError:
    return ListenError(
        errno.EMFILE,
        f"{address} is not available in this worker, which has no file descriptor left; raise the limit on "
        "open files (ulimit -n)",
    )


def broker_unavailable(address: str, why: str, code: int = errno.EPIPE) -> BrokerUnavailable:
    remedy = "if this persists, restart gunicorn"
    if code == errno.ETIMEDOUT:
        remedy = "the broker acts on the request as soon as it can; if it does not, restart gunicorn"
    return BrokerUnavailable(
        code,
        f"{address} is not available in this worker: the master's port broker {why}; "
        f"the primary is still served; {remedy}",
    )


def auto_installed_twice(first: str, second: str) -> AlreadyInstalled:
    return AlreadyInstalled(
        f"listen() was called a second time (on {second}), which auto-install mode does not allow: the first "
        f"server (on {first}) was installed on the primary socket, which the web server reaches, and has no "
        "port of its own. To run several servers, first call passenger.configure(auto_install=False), then "
        "listen('passenger') on the server that the web server should reach; every other listen() then gets "
        "its port from the gunicorn master. For a script without changes: gunicorn-passenger start SCRIPT "
        "--primary PORT"
    )


def passenger_twice(first: str) -> AlreadyInstalled:
    return AlreadyInstalled(
        f"listen('passenger') was called a second time, but server {first!r} already has the primary socket. "
        "Let this server listen on a port (listen(9000)) and reach it through "
        "http_proxy.create_server(9000, 'localhost').listen('passenger'), or close() the first server"
    )


def asgi_instance_missing(app: object, is_class: bool) -> NotCallable:
    if is_class:
        return NotCallable(
            f"create_server() takes an application; {app!r} is a class of ASGI applications: pass an "
            "instance, such as create_server(App())"
        )
    return NotCallable(
        f"create_server() takes a WSGI application or an ASGI application of version 3, "
        f"app(scope, receive, send); {app!r} is one of ASGI version 2, app(scope)(receive, send): wrap it "
        "with asgiref.compatibility.guarantee_single_callable"
    )


def unknown_interface(app: object) -> NotCallable:
    return NotCallable(
        f"create_server() takes a WSGI application, app(environ, start_response), or an ASGI application, "
        f"async app(scope, receive, send); {app!r} takes other arguments: pass a framework's application "
        "object"
    )


def wrong_interface(app: object, named: str, found: str) -> NotCallable:
    return NotCallable(
        f"create_server(interface={named!r}): {app!r} is an application for {found.upper()}; leave interface "
        f"out, or say interface={found!r}"
    )


def uvicorn_missing(found: str, needed: str) -> PassengerError:
    what = f"uvicorn {found}, which is too old" if found else "no uvicorn"
    return PassengerError(
        f"create_server() runs ASGI applications with uvicorn {needed} or newer, but this Python has {what}: "
        "pip install 'gunicorn-passenger[asgi]'"
    )


def asgi_primary(name: str) -> ListenError:
    return ListenError(
        errno.EINVAL,
        f"the server {name!r} has an ASGI application and cannot be the primary, which is WSGI: let it "
        "listen on a port (listen(9000)) and, for the web server to reach it, put a proxy in front "
        "(http_proxy.create_server(9000, 'localhost').listen('passenger')); in auto-install mode, first call "
        "passenger.configure(auto_install=False)",
    )


def asgi_as_wsgi(name: str) -> PassengerError:
    return PassengerError(
        f"the server {name!r} has an ASGI application, and gunicorn calls it as a WSGI application: name "
        "another one in gunicorn's command line, or run a worker class for ASGI"
    )


def lifespan_failed(name: str, reason: str) -> PassengerError:
    return PassengerError(
        f"the ASGI application of the server {name!r} did not start: its lifespan failed at startup "
        f"({reason}); correct the application's startup, then reload gunicorn"
    )


def asgi_thread_failed(name: str, reason: str) -> PassengerError:
    return PassengerError(
        f"the thread of the ASGI server {name!r} cannot start: {reason}; raise the limit on processes "
        "(ulimit -u, pids.max), then reload gunicorn"
    )
