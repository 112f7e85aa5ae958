"""Sends its arguments to the WebSocket, and prints the responses: python client.py hello world"""

import sys

from websockets.sync.client import connect

with connect("ws://127.0.0.1:8000/live/shout") as ws:
    for word in sys.argv[1:]:
        ws.send(word)
        print(ws.recv())
