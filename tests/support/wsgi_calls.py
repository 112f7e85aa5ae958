"""Calls of a WSGI application as another server makes them."""

import io


def environ(body=b"", **more):
    """What another WSGI server gives an application."""
    return {
        "REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/", "QUERY_STRING": "",
        "SERVER_PROTOCOL": "HTTP/1.1", "SERVER_NAME": "a", "SERVER_PORT": "80", "HTTP_HOST": "client.example",
        "REMOTE_ADDR": "192.0.2.7", "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(body),
        "wsgi.version": (1, 0), "wsgi.errors": io.StringIO(), "wsgi.multithread": True,
        "wsgi.multiprocess": False, "wsgi.run_once": False, **more,
    }  # fmt: skip


def call(app, environ):
    """Status, headers and body of an application's response."""
    said = []
    made = app(environ, lambda status, headers, exc_info=None: said.append((status, headers)))
    try:
        body = b"".join(made)
    finally:
        getattr(made, "close", lambda: None)()
    return int(said[0][0][:3]), said[0][1], body
