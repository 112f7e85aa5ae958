"""Werkzeug's proxy. It wants a prefix: its table cannot name the root."""

import os

from werkzeug.exceptions import NotFound
from werkzeug.middleware.http_proxy import ProxyMiddleware

application = ProxyMiddleware(NotFound(), {"/bench/": {"target": os.environ["BENCH_TARGET"]}})
