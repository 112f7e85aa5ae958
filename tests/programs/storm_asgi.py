"""The application of a storm for ASGI: the same requests as those of ``storm_app``, without ``/held``."""

import asyncio
import hashlib
import json
import os
from urllib.parse import parse_qsl


def application(content, pieces):
    """``content`` is sent in so many pieces."""

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            for _ in range(2):
                await send({"type": (await receive())["type"] + ".complete"})
            return
        query = dict(parse_qsl(scope["query_string"].decode()))
        head = [(b"x-worker", str(os.getpid()).encode()), (b"content-type", b"application/octet-stream")]
        down = scope["path"] == "/down"
        answer = content if down else scope["query_string"]
        if scope["path"] == "/up":
            answer = await digest(receive)
        if query.get("framing") != "chunked":
            head.append((b"content-length", str(len(answer)).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": head})
        size = len(answer) // pieces if down else len(answer)
        for start in range(0, len(answer), size or 1):
            body = answer[start : start + size]
            await send({"type": "http.response.body", "body": body, "more_body": True})
            if down:
                await asyncio.sleep(float(query.get("pause", "0")))
        await send({"type": "http.response.body", "body": b""})

    return app


async def digest(receive):
    count, found, more = 0, hashlib.sha256(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client has left")
        data, more = message.get("body", b""), message.get("more_body", False)
        count += len(data)
        found.update(data)
    return json.dumps({"length": count, "sha256": found.hexdigest()}).encode()
