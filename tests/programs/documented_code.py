"""Runs blocks of Python from the documentation, each in a process of its own.

Reads ``[[name, code], ...]`` as JSON, and writes ``{name: traceback}`` of those that raise. What the pages leave
out (the user's own application) is defined here. No port is opened and no daemon is started: the package is in
the state that it has in a master that preloads the program, where it only checks what it is asked for.
"""

import json
import os
import socket
import sys
import traceback
import types

IS_DAEMON = True  # the package then opens nothing

import flask  # noqa: E402
import gunicorn.app.base  # noqa: E402, F401

import gunicorn_passenger as passenger  # noqa: E402
from gunicorn_passenger import http_proxy, status  # noqa: E402
from gunicorn_passenger.daemons import api  # noqa: E402

IS_DAEMON = False  # spawn() checks everything
api._place = lambda spec, reading: api.Daemon(spec.name, api._known_address(spec))

#: Files that the reader of a page has, and this machine has under another name.
FILES = {"/etc/ssl/private-ca.pem": "/etc/ssl/certs/ca-certificates.crt"}


def application(environ, start_response):
    start_response("200 OK", [])
    return [b""]


def work(queue):
    """The job of the pages' module ``jobs``."""


def names():
    """The names of the user's program."""
    shop = types.ModuleType("shop")
    shop.application = shop.internal_api = shop.metrics = application
    jobs = types.ModuleType("jobs")
    jobs.work = work
    sys.modules |= {"shop": shop, "jobs": jobs}
    app = flask.Flask("app")
    scheduler = types.SimpleNamespace(start=print, shutdown=print)
    return {
        "__name__": "documented", "app": app, "application": app, "target": application, "make_id": print,
        "scheduler": scheduler, "passenger": passenger, "http_proxy": http_proxy, "status": status, "socket": socket,
    }  # fmt: skip


def run(code):
    """Run one block in a child; the traceback, if it raises."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            if "django" in code:
                import django.conf

                apps = ("admin", "auth", "contenttypes", "messages", "sessions")
                django.conf.settings.configure(INSTALLED_APPS=[f"django.contrib.{app}" for app in apps])
                django.setup()
            listener = socket.socket()
            os.dup2(listener.fileno(), 3)  # where a daemon finds its first socket
            for path, here in FILES.items():
                code = code.replace(path, here)
            exec(compile(code, "the block", "exec"), names())
        except BaseException:
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as file:
        text = file.read()
    os.wait()
    return text


# descriptor 3 is the daemon's in the blocks: the pipes are others
os.dup2(0, 3)
print(json.dumps({name: text for name, code in json.load(sys.stdin) if (text := run(code))}))
