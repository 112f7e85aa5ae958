"""socketserver.TCPServer as it comes (without allow_reuse_address), with HTTP by hand."""

import socketserver
import threading

from answering import PORT, application, converse, listening  # noqa: F401 (what gunicorn serves)


class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        converse(self.request, self.client_address)


def serve():
    with socketserver.TCPServer(("127.0.0.1", PORT), Handler) as server:
        listening(server.socket)
        server.serve_forever()


if __name__ == "__main__":
    serve()
else:
    threading.Thread(target=serve, daemon=True).start()
