"""An ordinary Flask script, written for `python server.py`. It contains nothing for gunicorn."""

import os

from flask import Flask

app = Flask(__name__)


@app.get("/")
def hello():
    return f"Hello from process {os.getpid()}\n"


if __name__ == "__main__":
    app.run(port=5000)
