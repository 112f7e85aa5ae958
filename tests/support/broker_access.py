"""Code that a test runs in a worker, to reach its end of the channel to the broker."""

from http_client import fetch

#: In a worker: its end of the channel.
BROKER = "__import__('gunicorn_passenger.serving.registry').serving.registry.registry.broker"


def run(process, code):
    status, text = fetch(process.socket, "/eval", "POST", code)
    assert status == 200, text
    return text


def raw(data):
    return f"{BROKER}._sock._sock.send({data!r})"
