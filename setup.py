"""What setup.cfg cannot say: the modules that are compiled, where GUNICORN_PASSENGER_COMPILE=1 asks for it.

mypyc turns them into C, from the same source; without it they are Python. Each connection and each request
runs through them. Not among them are modules with classes that extend one of gevent, gunicorn or the standard
library, whose layout mypyc does not know, and http/greenlet_pool.py, which counts references.

An editable installation is never compiled: Python would prefer the result to the source beside it.
"""

import os
import sys

from setuptools import setup

COMPILED = {
    "http": """
        acceptor body chunked connection connection_life connection_output listener_context request_head
        response response_cache timeouts transport write_coalescing
    """,
    "proxy": """
        copy_response downstream forward forwarded_request handler plain_headers plan pool request_body
        request_headers request_target response_head round_trip upstream_request wire
    """,
}

if os.environ.get("GUNICORN_PASSENGER_COMPILE") and "editable_wheel" not in sys.argv:
    try:
        from mypyc.build import mypycify
    except ImportError:
        # pip asks for what is required before it builds
        setup(setup_requires=["mypy==2.4.1"])
    else:
        files = [
            f"gunicorn_passenger/{part}/{name}.py" for part in COMPILED for name in COMPILED[part].split()
        ]
        options = ["--config-file=", "--ignore-missing-imports", *files]
        setup(ext_modules=mypycify(options, group_name="gunicorn_passenger"))
else:
    setup()
