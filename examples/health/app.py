"""An application whose workers can all be busy at once.

gunicorn -b unix:/tmp/health.sock app
"""

import os


def application(environ, start_response):
    if environ["PATH_INFO"] == "/report":
        # a library in C that waits by itself: this worker serves no other client for three seconds
        os.system("sleep 3")
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"Hello from worker {os.getpid()}\n".encode()]
