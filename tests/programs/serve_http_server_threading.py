"""http.server.ThreadingHTTPServer."""

import threading
from http.server import ThreadingHTTPServer

from answering import PORT, Handler, application, listening  # noqa: F401 (what gunicorn serves)


def serve():
    with ThreadingHTTPServer(("127.0.0.1", PORT), Handler) as server:
        listening(server.socket)
        server.serve_forever()


if __name__ == "__main__":
    serve()
else:
    threading.Thread(target=serve, daemon=True).start()
