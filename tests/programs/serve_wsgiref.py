"""wsgiref.simple_server."""

import threading
from wsgiref.simple_server import make_server

from answering import PORT, application, listening


def serve():
    with make_server("127.0.0.1", PORT, application) as server:
        listening(server.socket)
        server.serve_forever()


if __name__ == "__main__":
    serve()
else:
    threading.Thread(target=serve, daemon=True).start()
