"""cheroot.wsgi.Server."""

import threading

from answering import PORT, application, listening
from cheroot import wsgi


def serve():
    server = wsgi.Server(("127.0.0.1", PORT), application, numthreads=4)
    server.prepare()
    listening(server.socket)
    server.serve()


if __name__ == "__main__":
    serve()
else:
    threading.Thread(target=serve, daemon=True).start()
