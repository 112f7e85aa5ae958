"""What the servers of the ``serve_*`` programs have in common: their port, and what they answer."""

import os
from http.server import BaseHTTPRequestHandler

PORT = int(os.environ.get("P1", 0))


def text_for(path, peer):
    """The worker's pid; at /peer the client's address as the server knows it."""
    return f"{peer[0]} {peer[1]}" if path == "/peer" else str(os.getpid())


def application(environ, start_response):
    peer = environ.get("REMOTE_ADDR"), environ.get("REMOTE_PORT", "-")
    text = text_for(environ["PATH_INFO"], peer).encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(text)))])
    return [text]


def converse(conn, peer):
    """HTTP by hand: one request on an accepted connection, which the caller closes."""
    with conn.makefile("rb") as lines:
        path = lines.readline().split(b" ")[1:2]
        while lines.readline().strip():
            pass
    if path:
        text = text_for(path[0].decode(), peer)
        conn.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())


class Handler(BaseHTTPRequestHandler):
    """The same for http.server."""

    def do_GET(self):
        text = text_for(self.path, self.client_address).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


async def answer(reader, writer):
    """The same for asyncio.start_server."""
    line = await reader.readline()
    while (await reader.readline()).strip():
        pass
    if line:
        text = text_for(line.split(b" ")[1].decode(), writer.get_extra_info("peername"))
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
        await writer.drain()
    writer.close()


def listening(sock):
    """Let the test see what the program sees."""
    print(f"{os.getpid()} listens on {sock.getsockname()}", flush=True)
