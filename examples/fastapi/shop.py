"""A shop in Flask, an admin interface in FastAPI on port 9500, and metrics on port 9501.

gunicorn shop:shop
"""

import asyncio
import os
import time
from contextlib import asynccontextmanager

from fastapi import FastAPI, WebSocket
from flask import Flask
from prometheus_client import Counter, start_http_server

import gunicorn_passenger as passenger

orders = Counter("shop_orders", "Orders placed")
shop = Flask(__name__)


@shop.get("/")
def order():
    orders.inc()
    return f"An order for worker {os.getpid()}\n"


@asynccontextmanager
async def lifespan(_admin):
    yield {"started": time.time()}


admin = FastAPI(title="The shop's admin", lifespan=lifespan)


@admin.get("/")
async def servers():
    """What ``passenger.servers()`` knows of the program."""
    return [{"name": s.name, "address": s.address, "state": s.state} for s in passenger.servers()]


@admin.get("/report")
def report():
    """A slow report. FastAPI calls a ``def`` function in a thread, so it holds up no other request."""
    time.sleep(2)
    return {"worker": os.getpid(), "orders": "counted"}


@admin.websocket("/clock")
async def clock(peer: WebSocket):
    """The seconds since the worker has started, each second."""
    await peer.accept()
    while True:
        await peer.send_text(f"{time.time() - peer.state.started:.0f}")
        await asyncio.sleep(1)


passenger.create_server(admin).listen(9500, name="admin")
start_http_server(9501, "127.0.0.1")
