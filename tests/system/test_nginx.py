"""A real nginx in front of the UNIX socket, through reloads under load."""

import os
import threading

import pytest
from conditions import wait_for
from free_ports import free_port
from http_client import fetch, refused
from processes import require


@pytest.fixture
def nginx(start, home):
    """nginx as a web server is often configured: HTTP/1.0 to the application for the socket of this test's home."""
    program = require("nginx")
    port = free_port()
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
            upstream app {{ server unix:{home}/app.sock fail_timeout=0; }}
            server {{
                listen 127.0.0.1:{port};
                location / {{
                    proxy_pass http://app;
                    proxy_set_header Host $host;
                    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
                    proxy_set_header X-Forwarded-Proto $scheme;
                }}
            }}
        }}
        """,
    )
    start.run(program, "-c", conf, "-p", home)
    wait_for(lambda: not refused(port), "nginx")
    return port


@pytest.mark.parametrize("kind", ["module", "script"])
def test_nginx_in_front_through_reloads(start, port, nginx, kind):
    if kind == "module":
        start.write(
            "app.py",
            f"""
            import os
            import gunicorn_passenger as passenger
            from gunicorn_passenger import http_proxy

            application = http_proxy.create_server({port}, "localhost").listen("passenger")

            def target(environ, start_response):
                start_response("200 OK", [])
                return [environ["HTTP_X_FORWARDED_FOR"].encode()]

            passenger.create_server(target).listen({port})
            """,
        )
        process = start.gunicorn("app", workers=3)
    else:
        script = start.write(
            "server.py",
            """
            from flask import Flask, request
            app = Flask(__name__)
            app.route("/")(lambda: request.headers["X-Forwarded-For"])
            app.run(port=5000)
            """,
        )
        process = start.start_script(script, "-w", "3")
    wait_for(lambda: os.path.exists(process.socket), "the socket")
    wait_for(lambda: fetch(nginx)[0] == 200, "an answer through nginx")
    end, answers = threading.Event(), []

    def load():
        while not end.is_set():
            answers.append(fetch(nginx))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            process.hup(3)
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert len(answers) > 20
    assert set(answers) == {(200, "127.0.0.1")}
