"""The proxy as the primary, with a table of real peers, and a second server of the same program among them."""

import json
import os

import ws_app

import gunicorn_passenger as passenger
from gunicorn_passenger import http_proxy

ports = json.loads(os.environ["PEERS"])

passenger.create_server(ws_app.application).listen(ports["chat"], name="chat")

application = http_proxy.create_server(
    {
        "/": f"http://127.0.0.1:{ports['node']}",
        "/node/": {"target": f"http://127.0.0.1:{ports['node']}/", "remove_prefix": True},
        "/nginx/": {"target": ports["nginx"], "remove_prefix": True},
        "/limited/": {"target": ports["limited"], "remove_prefix": True},
        "/pyws/": f"ws://127.0.0.1:{ports['pyws']}",
        "/waits/": {"target": ports["node"], "remove_prefix": True, "ws_stop": "wait"},
        "/chat/": {"target": "chat", "remove_prefix": True},
        "/socket.io/": "chat",
    },
    "127.0.0.1",
    xfwd=True,
).listen("passenger")
