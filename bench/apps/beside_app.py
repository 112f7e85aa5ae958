"""For beside.py: a server of the standard library, opened as a program opens it, beside the application."""

import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer


def pid():
    # at each request: the program is imported in uWSGI's master
    return str(os.getpid()).encode()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(pid())

    def log_message(self, format, *args):
        pass


if second := os.environ.get("BENCH_SECOND"):
    server = HTTPServer(("127.0.0.1", int(second)), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def say_pid(environ, start_response):
    # long enough for a second request to need a second worker
    time.sleep(0.05)
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [pid()]
