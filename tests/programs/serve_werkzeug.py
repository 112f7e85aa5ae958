"""Werkzeug's run_simple."""

import threading

from answering import PORT, application
from werkzeug.serving import run_simple


def serve():
    run_simple("127.0.0.1", PORT, application)


if __name__ == "__main__":
    serve()
else:
    threading.Thread(target=serve, daemon=True).start()
