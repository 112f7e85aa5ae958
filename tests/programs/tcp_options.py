"""A server that sets and reads the options of TCP and IP on its listening and accepted sockets."""

import json
import os
import socket
import socketserver

WANTED = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1),
    (socket.IPPROTO_IP, socket.IP_TOS, 0x10),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
]


def exercise(sock):
    """What the options read as, once set."""
    for level, option, value in WANTED:
        sock.setsockopt(level, option, value)
    found = [sock.getsockopt(level, option) for level, option, _ in WANTED]
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return {"options": found, "info": len(info), "name": sock.getsockname()}


class Handler(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self):
        while self.rfile.readline().strip():
            pass
        text = json.dumps(
            {
                "listening": exercise(self.server.socket),
                "accepted": exercise(self.request),
                "peers": [self.client_address, self.request.getpeername()],
            }
        )
        self.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def server_bind(self):
        exercise(self.socket)
        super().server_bind()
        exercise(self.socket)


with Server(("127.0.0.1", int(os.environ["P1"])), Handler) as server:
    server.serve_forever()
