"""A socket of the standard library that gevent has not patched, in threads of the system."""

import gevent
from answering import PORT, application, converse  # noqa: F401 (what gunicorn serves)
from gevent import monkey

Socket = monkey.get_original("socket", "socket")


def serve():
    with Socket() as listener:
        listener.bind(("127.0.0.1", PORT))
        listener.listen()
        while True:
            conn, peer = listener.accept()
            with conn:
                assert conn.gettimeout() is None
                converse(conn, peer)


gevent.get_hub().threadpool.spawn(serve)
