"""A worker that does what it is told: it runs the Python that it is sent, and answers with ``result``.

Names last from one request to the next. A GET is answered with the worker's pid.
"""

import json
import os

names = {}


def obey(code):
    names["result"] = None
    try:
        exec(code, names)
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return {"error": kinds, "errno": getattr(error, "errno", None), "text": str(error)}
    return {"result": names["result"]}


def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    if environ["REQUEST_METHOD"] == "GET":
        return [str(os.getpid()).encode()]
    return [json.dumps(obey(environ["wsgi.input"].read().decode())).encode()]
