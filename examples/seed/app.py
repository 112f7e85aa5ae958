"""Two servers, and a proxy from one to the other.

Passenger's documentation shows a Node program that opens a second server and proxies to it. This Python
program does the same under gunicorn, with any number of workers:

    gunicorn -k gunicorn_passenger.Worker -w 4 -b unix:/tmp/seed.sock app
"""

import json

import gunicorn_passenger as passenger
from gunicorn_passenger import http_proxy

# Switch auto-install off. Under `gunicorn-passenger start` it is on: the first server that calls listen()
# would become the one that the web server reaches, and a second listen() would be an error.
passenger.configure(auto_install=False)

# The server that the web server reaches, on the UNIX socket that gunicorn opened. It forwards every
# request to port 9000. gunicorn looks for the name `application`.
application = http_proxy.create_server(9000, "localhost").listen("passenger")


# An ordinary WSGI application: the second server.
def target(environ, start_response):
    headers = {
        name[5:].replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_")
    }
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [("request successfully proxied!\n" + json.dumps(headers, indent=2)).encode()]


# The gunicorn master opens port 9000 once. It checks that the port is allocated to your account, and
# shares the open socket with every worker. So four workers listen on it, where the second plain socket
# would fail with "Address already in use".
passenger.create_server(target).listen(9000)

# Under gunicorn this returns at once, and the worker serves. With plain `python app.py` it serves both
# servers until Ctrl-C, the first one on http://127.0.0.1:8000/ (or the port in PORT).
if __name__ == "__main__":
    passenger.serve_forever()
