"""Requests to the status application."""

import contextlib
import http.client
import json

from conditions import wait_for
from http_client import Client
from prometheus_client.parser import text_string_to_metric_families as parse_text


def get(where, path, method="GET", **headers):
    """Status, headers, body."""
    client = Client(where)
    try:
        client.request(
            method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )
        response = client.getresponse()
        return response.status, response.headers, response.read().decode()
    finally:
        client.close()


def samples(where, path="/metrics", parse=parse_text, **headers):
    """Each sample of a metrics page: (name, labels as a frozen set) to its value; a name that comes twice fails."""
    code, _, text = get(where, path, **headers)
    assert code == 200, text
    found = {}
    for family in parse(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(found, name, **labels):
    """The one sample of a name with these labels among its own."""
    values = [v for (n, own), v in found.items() if n == name and labels.items() <= dict(own).items()]
    assert len(values) == 1, (name, labels, values)
    return values[0]


def ready(port, workers):
    """Wait until so many workers are ready."""

    def look():
        with contextlib.suppress(OSError, http.client.HTTPException):
            code, _, body = get(port, "/health")
            return code == 200 and json.loads(body)["workers"]["ready"] == workers
        return False

    wait_for(look, f"{workers} ready workers")
