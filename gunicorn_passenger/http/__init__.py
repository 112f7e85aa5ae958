"""The HTTP/1.1 core: from an accepted connection to a WSGI call and back, on gevent.

The path of a request: :mod:`.acceptor` accepts and creates a :mod:`.connection`. That reads the headers
(:mod:`.request_head`), calls the application of the :mod:`.listener_context` with a body (:mod:`.body`) and a
response (:mod:`.response`), and waits for the next request. :mod:`.connection_state` lists what it may do
next, :mod:`.greenlet_pool` lends it a greenlet, and :mod:`.write_coalescing` flushes the responses of a busy
worker.

:mod:`.downstream_api` lists what the reverse proxy uses of a connection.

Process: a *serving process*: a worker, plain Python, or the status daemon.
Never: import the proxy, or use the master.
"""
