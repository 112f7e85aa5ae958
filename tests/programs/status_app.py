"""Shows itself: the status application on P1, a second server on P2 under NAME, a count of its own with COUNT."""

import os

import gunicorn_passenger as passenger
from gunicorn_passenger import status

hello = None
if "COUNT" in os.environ:
    # multiprocess: workers of another user may not be able to read where this Python is installed
    from prometheus_client import REGISTRY, Counter, Gauge, multiprocess  # noqa: F401

    hello = Counter("hello", "Requests")
    alive = Gauge("alive", "Workers", multiprocess_mode="livesum")
    # what a server of prometheus_client that starts here shows at once
    print("loading:", REGISTRY.get_sample_value("hello_total"), flush=True)


@passenger.on("ready")
def ready(worker):
    if hello is not None:
        alive.set(1)


def application(environ, start_response):
    path = environ["PATH_INFO"]
    if path == "/spin":
        start_response("200 OK", [("Content-Type", "text/plain"), ("Connection", "close")])
        return spin()
    start_response("500 Oh" if path == "/500" else "200 OK", [("Content-Type", "text/plain")])
    if hello is not None and path != "/":
        hello.inc()
    return [str(os.getpid()).encode()]


def spin():
    """Nothing else gets its turn in this process from now on."""
    yield b"spinning\n"
    while not os.path.exists(os.environ["ENOUGH"]):
        sum(range(20000))


def mounted(environ, start_response):
    """The status application below a prefix."""
    if environ["PATH_INFO"].startswith("/ops"):
        environ["SCRIPT_NAME"], environ["PATH_INFO"] = "/ops", environ["PATH_INFO"][4:]
        return status.application(environ, start_response)
    return application(environ, start_response)


if "P1" in os.environ:
    passenger.listen(int(os.environ["P1"]), status)
if "P2" in os.environ:
    passenger.create_server(mounted).listen(int(os.environ["P2"]), name=os.environ.get("NAME", "second"))
if "P3" in os.environ:
    passenger.create_server(application).listen(int(os.environ["P3"]), placement="one", name="single")
if "SPAWN" in os.environ:
    status.spawn(int(os.environ["SPAWN"]), name="health")
if "FAILING" in os.environ:
    passenger.spawn(os.environ["FAILING"], name="failing", give_up_after=1)
