"""Coverage-guided fuzzing of the request reader: no crash, no hang, no request that gunicorn does not see.

    make fuzz                 # bounded: RUNS=50000
    make fuzz RUNS=10000000   # for a night

The first bytes of an input say where the rest is cut into pieces, and whether the client has bound its end of
the UNIX socket to a name, which may be any bytes. What is found is written to the
directory given with ``-artifact_prefix``; a case that is fixed goes into ``corpus/``.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

with atheris.instrument_imports(include=["gunicorn_passenger.http"]):
    import http_model
from gunicorn.config import Config

CFG = Config()
NARROW = Config()
for name, limit in (
    ("limit_request_line", 60),
    ("limit_request_fields", 4),
    ("limit_request_field_size", 60),
):
    NARROW.set(name, limit)
GATES = [(http_model.gateway(CFG), CFG), (http_model.gateway(NARROW), NARROW)]


def one_input(data: bytes) -> None:
    if len(data) < 4:
        return
    gate, cfg = GATES[data[0] & 1]
    # what is said again means the same: fields that have come before are not parsed
    times = 3 if data[0] & 2 else 1
    peer: str | bytes = ""
    stream = data[4:]
    if data[0] & 4:
        peer, stream = stream[: data[3]], stream[data[3] :]
        if data[0] & 8:
            peer = peer.decode("utf-8", "surrogateescape")  # the name of a file, as accept() gives it
    found = http_model.disagreement(gate, cfg, stream * times, list(data[1:4]), peer)
    if found:
        raise AssertionError(found)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
