"""Does what the file ``program.py`` in the current directory says, and answers its result.

``/`` answers the pid; ``/eval`` evaluates the request's body where the program runs.
"""

import os
import sys
import traceback

import gunicorn_passenger as passenger

space = {"passenger": passenger, "os": os}


def whoami(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]


space["whoami"] = whoami


def application(environ, start_response):
    if environ["PATH_INFO"] != "/eval":
        return whoami(environ, start_response)
    code = environ["wsgi.input"].read().decode()
    try:
        try:
            text = repr(eval(code, space))
        except SyntaxError:
            exec(code, space)
            text = ""
        start_response("200 OK", [])
    except BaseException:
        text = traceback.format_exc()
        start_response("500 Error", [])
    return [text.encode()]


if os.path.exists("program.py"):
    sys.path.insert(0, os.getcwd())
    with open("program.py") as file:
        exec(compile(file.read(), "program.py", "exec"), space)
