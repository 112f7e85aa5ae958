"""A Flask application, and a second server that the container publishes."""

import os

from flask import Flask

import gunicorn_passenger as passenger

application = Flask(__name__)
admin = Flask("admin")


@application.route("/")
def home():
    return f"Hello from worker {os.getpid()}\n"


@admin.route("/")
def overview():
    return "the admin\n"


# 127.0.0.1 would be the container's own, which no published port reaches
passenger.create_server(admin).listen(9000, host="0.0.0.0")
