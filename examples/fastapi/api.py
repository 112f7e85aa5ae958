"""A FastAPI application as the primary, under gunicorn's own asgi workers, and its metrics on port 9502.

gunicorn -c asgi.conf.py api:api
"""

import os

from fastapi import FastAPI
from prometheus_client import Counter, start_http_server

orders = Counter("api_orders", "Orders placed")
api = FastAPI(title="The shop's API")


@api.get("/")
async def order():
    orders.inc()
    return {"worker": os.getpid()}


start_http_server(9502, "127.0.0.1")
