"""A second server with the placement that the environment says; answers with pid, name and address."""

import json
import os
import time

import gunicorn_passenger as passenger
from gunicorn_passenger import http_proxy


def application(environ, start_response):
    if environ["PATH_INFO"].startswith("/to/"):
        return http_proxy.create_server(environ["PATH_INFO"][4:])(environ, start_response)
    if environ["PATH_INFO"].startswith("/sticky/"):
        return sticky(environ, start_response)
    start_response("200 OK", [("Content-Type", "application/json")])
    if environ["PATH_INFO"] == "/servers":
        found = [[*server, server.worker] for server in passenger.servers()]
        return [json.dumps([os.getpid(), found]).encode()]
    return [str(os.getpid()).encode()]


sticky = http_proxy.create_server("jobs", sticky="cookie")


def second(environ, start_response):
    if environ["PATH_INFO"].startswith("/slow"):
        time.sleep(float(environ["PATH_INFO"][5:]))
    start_response("200 OK", [("Content-Type", "text/plain"), ("X-Name", server.name)])
    return [str(os.getpid()).encode()]


where = os.environ["P1"]
server = passenger.create_server(second).listen(
    int(where) if where.isdigit() else where, name="jobs", placement=os.environ["PLACEMENT"]
)
