"""The blocks of docs/deployment.md, with a real nginx and systemd's own checker."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import websocket
from conditions import wait_for
from free_ports import free_port
from http_client import answers, fetch, refused
from processes import require

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/deployment.md").read_text()


def block(language: str, number: int = 0) -> str:
    """A code block of the page."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[number]


@pytest.fixture
def nginx(start, home):
    """The port of an nginx with the page's configuration, in front of the socket of this test's home."""
    port = free_port()
    servers = block("nginx").replace("/run/app/app.sock", f"{home}/app.sock")
    servers = servers.replace("listen 80;", f"listen 127.0.0.1:{port};")
    conf = start.write(
        "nginx.conf",
        f"""
        daemon off;
        worker_processes 1;
        pid {home}/nginx.pid;
        error_log {home}/nginx-error.log;
        {"user root;" if os.geteuid() == 0 else ""}
        events {{ }}
        http {{
            access_log off;
            client_body_temp_path {home}/n1; proxy_temp_path {home}/n2; fastcgi_temp_path {home}/n3;
            uwsgi_temp_path {home}/n4; scgi_temp_path {home}/n5;
            {servers}
        }}
        """,
    )
    start.run(require("nginx"), "-c", conf, "-p", home)
    wait_for(lambda: not refused(port), "nginx")
    return port


def test_nginx_carries_websockets_and_keeps_connections(start, nginx):
    start.write(
        "app.py",
        """
        from flask import Flask, request
        from flask_sock import Sock

        application = Flask(__name__)
        sock = Sock(application)

        @application.route("/")
        def client_port():
            return request.headers.get("Connection", "none")

        @sock.route("/ws")
        def echo(ws):
            while True:
                ws.send(ws.receive())
        """,
    )
    process = start.gunicorn("app", "--keep-alive", "75", workers=2)
    wait_for(lambda: os.path.exists(process.socket), "the socket")
    wait_for(lambda: fetch(nginx)[0] == 200, "a response through nginx")
    assert fetch(nginx) == (200, "none"), "nginx asked for the connection to be closed"
    client = websocket.create_connection(f"ws://127.0.0.1:{nginx}/ws", timeout=30)
    try:
        for text in ("one", "two"):
            client.send(text)
            assert client.recv() == text
    finally:
        client.close()


@pytest.mark.parametrize(("xfwd", "proxies"), [(None, 1), (True, 2), (False, 1)])
def test_the_address_of_the_client(start, nginx, port, xfwd, proxies):
    """As the page's table says, for the primary (None) and for a second server behind the proxy."""
    start.write(
        "app.py",
        f"""
        import gunicorn_passenger as passenger
        from flask import Flask, request
        from gunicorn_passenger import http_proxy
        from werkzeug.middleware.proxy_fix import ProxyFix

        app = Flask(__name__)
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for={proxies}, x_proto={proxies})
        app.route("/")(lambda: f"{{request.remote_addr}} {{request.scheme}}")
        if {xfwd} is None:
            application = app
        else:
            passenger.create_server(app).listen({port})
            application = http_proxy.create_server({port}, xfwd={xfwd}).listen("passenger")
        """,
    )
    start.gunicorn("app", workers=2)
    wait_for(lambda: fetch(nginx)[0] == 200, "a response through nginx")
    # a client cannot choose its address: nginx appends the true one
    response = fetch(nginx, X_Forwarded_For="203.0.113.7", X_Forwarded_Proto="https")
    assert response == (200, "127.0.0.1 http")


def test_an_asgi_application_in_a_daemon(start, port):
    command = re.search(r"passenger\.spawn\(\"(uvicorn [^\"]+)\"", PAGE)[1]
    start.write(
        "app.py",
        """
        async def app(scope, receive, send):
            if scope["type"] == "http":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"asgi"})
        """,
    )
    start.write(
        "gunicorn.conf.py",
        f"""
        from gunicorn_passenger.hooks import *
        import gunicorn_passenger as passenger
        passenger.spawn("{os.path.dirname(sys.executable)}/{command}", name="api", listen={port})
        """,
    )
    process = start.gunicorn("anything", workers=1).wait_ready()
    wait_for(lambda: answers(port), "a response of the daemon")
    assert fetch(port) == (200, "asgi")
    assert process.stop() == 0


def test_the_unit_is_valid(tmp_path):
    unit = block("ini")
    program = tmp_path / "gunicorn"
    program.symlink_to(sys.executable)
    unit = unit.replace("/srv/shop/venv/bin/gunicorn", str(program))
    file = tmp_path / "shop.service"
    file.write_text(unit)
    analyze = require("systemd-analyze")
    done = subprocess.run([analyze, "verify", "--man=no", file], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "shop.service" in line or str(file) in line]
    assert (complaints, done.returncode) == ([], 0), done.stderr
