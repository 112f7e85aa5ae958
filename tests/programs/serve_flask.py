"""Flask's app.run."""

import threading

from answering import PORT, text_for
from flask import Flask, request

application = Flask(__name__)


@application.get("/")
@application.get("/peer")
def answer():
    return text_for(request.path, (request.remote_addr, request.environ.get("REMOTE_PORT")))


def serve():
    application.run("127.0.0.1", PORT)


if __name__ == "__main__":
    serve()
else:
    threading.Thread(target=serve, daemon=True).start()
