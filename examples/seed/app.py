"""The program of the document that this project comes from, in Python.

There, a Node program under Phusion Passenger opens a second server and proxies to it. Here, a Python
program under gunicorn does the same, with as many workers as you like:

    gunicorn -k gunicorn_passenger.Worker -w 4 -b unix:/tmp/seed.sock app
"""

import json

import gunicorn_passenger as passenger
from gunicorn_passenger import http_proxy

# No implicit capture: without this line (and under `gunicorn-passenger start`) the first server that
# calls listen() would become the one that the web server reaches, and a second listen() would be an error.
passenger.configure(auto_install=False)

# The server that the web server reaches, on the UNIX socket that gunicorn opened. It carries every
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


# Port 9000 is opened once, by the gunicorn master, which checks that it is allocated to your account
# and hands the open socket to every worker. So four workers listen on it, where four plain
# sockets would end in "Address already in use".
passenger.create_server(target).listen(9000)

# Under gunicorn this returns at once: the worker serves. With plain `python app.py` it serves both
# until Ctrl-C, the first one on http://127.0.0.1:8000/ (or the port in PORT).
if __name__ == "__main__":
    passenger.serve_forever()
