"""gevent.pywsgi.WSGIServer."""

import gevent
from answering import PORT, application, listening
from gevent.pywsgi import WSGIServer


def serve():
    server = WSGIServer(("127.0.0.1", PORT), application)
    server.start()
    listening(server.socket)
    server.serve_forever()


if __name__ == "__main__":
    serve()
else:
    gevent.spawn(serve)
