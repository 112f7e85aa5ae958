"""The HTTP/1.1 core: from an accepted connection to a WSGI call and back, on gevent.

The way of a request: :mod:`.acceptor` accepts and makes a :mod:`.connection`, which reads a head
(:mod:`.request_head`), calls the application through a :mod:`.listener_context` with a body (:mod:`.body`)
and a response (:mod:`.response`), and waits for the next.

What the reverse proxy uses of a connection is in :mod:`.downstream_api`.

Process: a worker, or plain Python.
Never: imports the proxy, or uses the master.
"""
