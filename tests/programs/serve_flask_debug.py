"""A script as Flask's tutorial writes it: app.run(debug=True)."""

from answering import PORT, text_for
from flask import Flask, request

app = Flask(__name__)


@app.get("/")
@app.get("/peer")
def answer():
    return text_for(request.path, (request.remote_addr, request.environ.get("REMOTE_PORT")))


@app.get("/fail")
def fail():
    raise ValueError("shown by the debugger")


if __name__ == "__main__":
    app.run(port=PORT, debug=True)
