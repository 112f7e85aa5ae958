"""Unmodified servers of all kinds, each in a thread of its own with what it waits in. ``PORTS`` are theirs."""

import asyncio
import os
import threading
from wsgiref.simple_server import WSGIRequestHandler, make_server

import aiohttp.web
import hypercorn.asyncio
import hypercorn.config
import tornado.httpserver
import tornado.web
import uvicorn
import waitress
from cheroot.wsgi import Server as CherootServer
from ports_in_threads import asgi, wsgi

HOST = "127.0.0.1"


class Quiet(WSGIRequestHandler):
    def log_message(self, *_):
        pass


def wsgiref(port):
    make_server(HOST, port, wsgi, handler_class=Quiet).serve_forever()


def with_waitress(port):
    waitress.serve(wsgi, host=HOST, port=port, threads=2)


def cheroot(port):
    CherootServer((HOST, port), wsgi, numthreads=2).start()


def asyncio_streams(port):
    async def respond(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        body = b"%d" % os.getpid()
        writer.write(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        writer.close()

    async def main():
        async with await asyncio.start_server(respond, HOST, port) as server:
            await server.serve_forever()

    asyncio.run(main())


def with_uvicorn(port):
    uvicorn.Server(uvicorn.Config(asgi, host=HOST, port=port, log_level="warning")).run()


def with_hypercorn(port):
    config = hypercorn.config.Config()
    config.bind, config.loglevel = [f"{HOST}:{port}"], "warning"
    forever = asyncio.Event()
    asyncio.run(hypercorn.asyncio.serve(asgi, config, shutdown_trigger=forever.wait))


def with_tornado(port):
    class Page(tornado.web.RequestHandler):
        def get(self):
            self.write(str(os.getpid()))

    async def main():
        tornado.httpserver.HTTPServer(tornado.web.Application([("/", Page)])).listen(port, HOST)
        await asyncio.Event().wait()

    asyncio.run(main())


def with_aiohttp(port):
    async def page(_request):
        return aiohttp.web.Response(text=str(os.getpid()))

    app = aiohttp.web.Application()
    app.add_routes([aiohttp.web.get("/", page)])
    aiohttp.web.run_app(
        app, host=HOST, port=port, print=None, handle_signals=False, loop=asyncio.new_event_loop()
    )


SERVERS = [
    wsgiref,
    with_waitress,
    cheroot,
    asyncio_streams,
    with_uvicorn,
    with_hypercorn,
    with_tornado,
    with_aiohttp,
]

for serve, port in zip(SERVERS, map(int, os.environ["PORTS"].split()), strict=True):
    threading.Thread(target=serve, args=(port,), name=serve.__name__, daemon=True).start()
