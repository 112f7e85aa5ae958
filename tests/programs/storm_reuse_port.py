"""A gunicorn.conf.py: every worker opens the port ``STORM_REUSE_PORT`` by itself, with ``SO_REUSEPORT``."""

import os
import socket


def post_worker_init(worker):
    from gevent import socket as gsocket
    from gevent.pywsgi import WSGIServer
    from storm_app import application

    listener = gsocket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", int(os.environ["STORM_REUSE_PORT"])))
    listener.listen(2048)
    WSGIServer(listener, application, log=None).start()
