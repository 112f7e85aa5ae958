"""A program that boots when the test lets it, on up to four servers; every answer is the version and the pid.

The file ``version`` says what a worker that boots now is. It waits for the file ``go-<version>``; then it runs what is
in ``boot.py``, if there is any. ``P1`` is the port of a server of ours, ``P2`` that of an unmodified one, ``P3`` that
of a server that one worker serves at a time.
"""

import os
import time
from pathlib import Path

VERSION = Path("version").read_text().strip()
Path(f"boots-{VERSION}-{os.getpid()}").touch()
while not os.path.exists(f"go-{VERSION}"):
    time.sleep(0.02)


def application(environ, start_response):
    if environ.get("HTTP_UPGRADE"):
        from simple_websocket import ConnectionClosed, Server

        ws = Server(environ)
        try:
            while True:
                ws.send(ws.receive())
        except ConnectionClosed:
            return []
    body = f"{VERSION} {os.getpid()}".encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


if os.path.exists("boot.py"):
    exec(compile(Path("boot.py").read_text(), "boot.py", "exec"))

if "P1" in os.environ:
    import gunicorn_passenger as passenger

    passenger.create_server(application).listen(int(os.environ["P1"]))
    if "P3" in os.environ:
        passenger.create_server(application).listen(int(os.environ["P3"]), placement="one", name="single")

if "P2" in os.environ:
    from gevent.pywsgi import WSGIServer

    WSGIServer(("127.0.0.1", int(os.environ["P2"])), application, log=None).start()
