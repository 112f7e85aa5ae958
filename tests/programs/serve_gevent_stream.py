"""gevent.server.StreamServer, with HTTP by hand."""

import gevent
from answering import PORT, application, converse, listening  # noqa: F401 (what gunicorn serves)
from gevent.server import StreamServer


def serve():
    server = StreamServer(("127.0.0.1", PORT), converse)
    server.start()
    listening(server.socket)
    server.serve_forever()


if __name__ == "__main__":
    serve()
else:
    gevent.spawn(serve)
