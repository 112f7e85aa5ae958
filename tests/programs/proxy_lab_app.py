"""Proxies that a test makes as it goes: what is posted to ``/<scene>`` is run here, its value answered."""

import io
import traceback

import gevent
import gevent.event
from werkzeug.wrappers import Request, Response

import gunicorn_passenger as passenger
from gunicorn_passenger import http_proxy


def serve(where, mode, target, host=None, **options):
    """A proxy behind ``where``: by itself (``direct``), or in an app that routes (``routed``).

    The routed one is made without the options and given them with every request.
    """
    if mode == "direct":
        return http_proxy.create_server(target, host, **options).listen(where)
    proxy = http_proxy.create_server(target, host)

    def app(environ, start_response):
        carry = proxy.ws if "HTTP_UPGRADE" in environ else proxy.web
        return carry(environ, start_response, **options)

    passenger.create_server(app).listen(where)
    return proxy


tools = {
    "io": io, "gevent": gevent, "passenger": passenger, "http_proxy": http_proxy, "serve": serve,
    "Request": Request, "Response": Response,
}  # fmt: skip

#: the variables of each scene, so that a handler of one test writes nothing into another's
scenes: dict[str, dict] = {}


def application(environ, start_response):
    if environ["REQUEST_METHOD"] != "POST":
        start_response("200 OK", [])
        return [b"here"]
    space = scenes.setdefault(environ["PATH_INFO"], {**tools, "seen": []})
    code = environ["wsgi.input"].read().decode()
    try:
        if code.startswith("\n") or " = " in code.partition("(")[0]:
            exec(compile(code, "scene", "exec"), space)
            text = "None"
        else:
            text = repr(eval(compile(code, "scene", "eval"), space))
        start_response("200 OK", [])
    except BaseException:
        text = traceback.format_exc()
        start_response("500 Error", [])
    return [text.encode()]
