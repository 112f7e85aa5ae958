"""A bare gevent loop that receives and sends a constant: run_bare.py APP SOCKET

No server on gevent can cost less. It parses nothing: what arrives in one piece is taken for a request.
"""

import sys

import plain
from gevent import socket
from gevent.server import StreamServer

BODY = {"plain:hello": b"Hello World!", "plain:large": plain.LARGE}[sys.argv[1]]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n" % len(BODY)
STAYS = HEAD + b"\r\n" + BODY
CLOSES = HEAD + b"Connection: close\r\n\r\n" + BODY


def serve(connection, address):
    while request := connection.recv(8192):
        if b"onnection: close" in request:
            connection.sendall(CLOSES)
            return
        connection.sendall(STAYS)


listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[2])
listener.listen(1024)
StreamServer(listener, serve).serve_forever()
