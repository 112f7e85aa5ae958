"""An application in native threads: its response on the way to the hub."""

import sys

import gevent
import pytest

from gunicorn_passenger.errors import ClientDisconnected
from gunicorn_passenger.http.body import EMPTY_BODY
from gunicorn_passenger.serving.threaded_app import ThreadedApplication


@pytest.fixture(autouse=True)
def limited():
    with gevent.Timeout(30):
        yield


def call(application, path="/"):
    started = []
    environ = {"wsgi.input": EMPTY_BODY, "wsgi.early_hints": None, "gunicorn.socket": None, "PATH_INFO": path}
    result = application(environ, lambda status, headers, exc_info=None: started.append(status))
    return started, result


def test_a_client_that_leaves_costs_no_thread():
    errors = []

    def app(environ, start_response):
        write = start_response("200 OK", [])
        if environ["PATH_INFO"] == "/leave":
            write(b"first")
            # as an application does that logs every error and writes its footer
            for _ in range(3):
                try:
                    write(b"more")
                except OSError as error:
                    errors.append(error)
        return [b"hello"]

    application = ThreadedApplication(app, threads=1)
    for _ in range(2):
        _, result = call(application, "/leave")
        assert next(iter(result)) == b"first"
        result.close()
        assert b"".join(call(application)[1]) == b"hello"
    assert errors
    assert all(isinstance(error, ClientDisconnected) for error in errors)


def test_an_error_after_the_first_chunk_does_not_change_the_status():
    """PEP 3333: start_response raises it again when the headers were sent."""

    def app(environ, start_response):
        start_response("200 OK", [])
        yield b""
        yield b"a part"
        try:
            raise ZeroDivisionError("of the application")
        except ZeroDivisionError:
            start_response("500 Oops", [], sys.exc_info())
        yield b"error"

    started, result = call(ThreadedApplication(app, threads=1))
    with pytest.raises(ZeroDivisionError, match="of the application"):
        list(result)
    assert started == ["200 OK"]


def test_an_error_before_the_first_chunk_changes_the_status():
    def app(environ, start_response):
        start_response("200 OK", [])
        yield b""
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            start_response("500 Oops", [], sys.exc_info())
        yield b"error"

    started, result = call(ThreadedApplication(app, threads=1))
    assert b"".join(result) == b"error"
    assert started == ["200 OK", "500 Oops"]
