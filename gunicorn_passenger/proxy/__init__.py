"""The reverse proxy: targets, options, header rewriting, upstream connections, tunnels.

A request is planned (:mod:`.plan`) and then executed (:mod:`.forward`). Under our own server the
proxy uses the connection through :mod:`gunicorn_passenger.http.downstream_api`; otherwise it uses WSGI alone.

Process: a worker or plain Python, wherever the proxy is mounted.
Never: use the master or the broker.
"""
