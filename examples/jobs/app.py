"""An application that leaves slow work to a process beside its workers.

gunicorn -b unix:/tmp/jobs.sock app
"""

import redis

store = redis.Redis.from_url("redis://127.0.0.1:9001", decode_responses=True)


def application(environ, start_response):
    """``POST /NAME`` asks for a job; ``GET /`` lists the jobs that are done."""
    if environ["REQUEST_METHOD"] == "POST":
        store.rpush("jobs", environ["PATH_INFO"].strip("/"))
        start_response("202 Accepted", [("Content-Type", "text/plain")])
        return [b"accepted\n"]
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{line}\n".encode() for line in store.lrange("done", 0, -1)]
