"""The WSGI application of a storm on Python's own http.server, as it is, in threads."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Chunks:
    """The body of a request that comes in chunks."""

    def __init__(self, file):
        self._lines = file
        self._left = 0

    def read(self, most):
        if not self._left:
            self._left = int(self._lines.readline(), 16)
            if not self._left:
                self._lines.readline()
                return b""
        data = self._lines.read(min(most, self._left))
        self._left -= len(data)
        if not self._left:
            self._lines.readline()
        return data


class Sized:
    """The body of a request of which the length is known."""

    def __init__(self, file, length):
        self._file = file
        self._left = length

    def read(self, most):
        data = self._file.read(min(most, self._left))
        self._left -= len(data)
        return data


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    application = None

    def do_GET(self):
        path, _, query = self.path.partition("?")
        chunked = "Transfer-Encoding" in self.headers
        length = int(self.headers.get("Content-Length", "0"))
        body = Chunks(self.rfile) if chunked else Sized(self.rfile, length)
        environ = {"PATH_INFO": path, "QUERY_STRING": query, "wsgi.input": body}
        for data in self.application(environ, self.start_response):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)
        if self.chunked:
            self.wfile.write(b"0\r\n\r\n")

    do_POST = do_GET

    def start_response(self, status, headers):
        self.send_response(int(status[:3]))
        for name, value in headers:
            self.send_header(name, value)
        self.chunked = all(name != "Content-Length" for name, _ in headers)
        if self.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def log_message(self, *_):
        pass


def start(port, application):
    handler = type("Handler", (Handler,), {"application": staticmethod(application)})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
