"""The WSGI applications that need nothing but Python."""

import time

LARGE = b"0123456789" * 1024


def respond(start_response, body):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


def hello(environ, start_response):
    return respond(start_response, b"Hello World!")


def large(environ, start_response):
    return respond(start_response, LARGE)


def post(environ, start_response):
    """Reads the body and tells its length."""
    body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    return respond(start_response, b"%d" % len(body))


def mixed(environ, start_response):
    """Waits for 20 ms, as for a database, when it is asked for /slow."""
    if environ["PATH_INFO"] == "/slow":
        time.sleep(0.02)
    return hello(environ, start_response)
