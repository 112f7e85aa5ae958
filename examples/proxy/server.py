"""Two applications behind one proxy: pages by Flask, and a WebSocket beside them.

    gunicorn -k gunicorn_passenger.Worker -w 4 -b 127.0.0.1:8000 server

The web server (or the browser) reaches only the proxy. A table of path prefixes selects the application.
"""

import os

import flask
import flask_sock

import gunicorn_passenger as passenger
from gunicorn_passenger import http_proxy

passenger.configure(auto_install=False)

# --- the pages -------------------------------------------------------------------------------------

pages = flask.Flask("pages")

PAGE = """<!doctype html>
<title>Shouting</title>
<input id="text" autofocus> <pre id="answers"></pre>
<script>
const socket = new WebSocket(location.href.replace(/^http/, "ws") + "live/shout");
socket.onmessage = (event) => answers.prepend(event.data + "\\n");
text.onchange = () => socket.send(text.value);
</script>
"""


@pages.get("/")
def page():
    return PAGE


@pages.get("/whoami")
def whoami():
    # with `xfwd=True` (below) the proxy writes X-Forwarded-For and X-Forwarded-Host
    headers = flask.request.headers
    return f"{headers['X-Forwarded-For']} asks {headers['X-Forwarded-Host']} for {flask.request.path}\n"


# --- the WebSocket ---------------------------------------------------------------------------------

live = flask.Flask("live")
sock = flask_sock.Sock(live)


@sock.route("/shout")
def shout(ws):
    while True:
        ws.send(f"{ws.receive().upper()}! (process {os.getpid()})")


# --- which path goes where -------------------------------------------------------------------------

# "auto" is any free port that is allocated to your account. The table refers to the servers by name.
passenger.create_server(pages).listen("auto", name="pages")
passenger.create_server(live).listen("auto", name="live")

application = http_proxy.create_server(
    {
        "/": "pages",
        # /live/shout is /shout there
        "/live/": {"target": "live", "remove_prefix": True},
    },
    xfwd=True,
).listen("passenger")

# Under gunicorn this returns at once, and the worker serves.
if __name__ == "__main__":
    passenger.serve_forever()
