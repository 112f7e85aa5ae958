"""What one client says reaches all, whichever worker serves them: as Server-Sent Events, and by WebSocket."""

from collections.abc import Iterator
from typing import Any

from flask import Flask, Response, request
from flask_sock import Sock

import gunicorn_passenger as passenger

application = Flask(__name__)
sock = Sock(application)
news = passenger.channel("news")


@application.get("/")
def page() -> str:
    return """<!doctype html><title>News</title><h1>News</h1><script>
new EventSource('events').onmessage = ({data}) => document.body.append(data, document.createElement('br'));
</script>"""


@application.post("/say")
def say() -> tuple[str, int]:
    news.publish(request.get_data(as_text=True))
    return "", 204


@application.get("/events")
def events() -> Response:
    def stream() -> Iterator[str]:
        # the comment finds out which clients have gone
        for message in news.subscribe(timeout=15):
            yield f"data: {' '.join(str(message).split())}\n\n" if message else ":\n\n"

    return Response(stream(), mimetype="text/event-stream")


@sock.route("/socket")
def socket(client: Any) -> None:
    for message in news.subscribe(timeout=15):
        if message:
            client.send(message)
        elif not client.connected:
            return
