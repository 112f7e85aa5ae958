"""A program whose every worker asks for the daemons that SPAWN names: Python that is run with ``spawn`` in reach."""

import os

import daemon_jobs  # noqa: F401 - for SPAWN

import gunicorn_passenger as passenger
from gunicorn_passenger import spawn  # noqa: F401 - for SPAWN

if os.path.exists(os.environ.get("SPAWN", "")):
    with open(os.environ["SPAWN"]) as file:
        exec(file.read())
else:
    exec(os.environ.get("SPAWN", ""))


def local(*_):
    """A function of the module that asks for it, and that opens a server too."""
    print(f"local {os.getpid()} {_}", flush=True)
    import time

    time.sleep(1000)


def application(environ, start_response):
    text = str(os.getpid()) if environ["PATH_INFO"] == "/" else repr(globals().get(environ["PATH_INFO"][1:]))
    start_response("200 OK", [("Content-Length", str(len(text)))])
    return [text.encode()]


if "LOCAL" in os.environ:
    passenger.create_server(application).listen(int(os.environ["LOCAL"]))
    passenger.spawn(local, args=[1])
