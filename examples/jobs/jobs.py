"""The job service. gunicorn.conf.py starts it, in an interpreter of its own that runs neither gevent nor the
application."""

import signal


def work(url):
    # Not at the top: the master imports this file, too, and redis imports ssl. gevent must patch ssl in the
    # workers before it is imported.
    import redis

    store = redis.Redis.from_url(url, decode_responses=True)
    stopping = []
    # a job that has begun is finished
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    while not stopping:
        job = store.blpop("jobs", timeout=1)
        if job:
            name = job[1]
            print(f"works on {name}")
            store.rpush("done", f"{name} is done")
    print("has no job in hand, and exits")
