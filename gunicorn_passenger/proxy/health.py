"""Active health checks: requests a path of each of several targets from time to time (the option ``health``).

Process: any process in which the proxy is mounted; a greenlet or thread for each group of targets, and one
for each check.
Never: delay a request, or keep a group of targets alive that its proxy has dropped.
"""

from __future__ import annotations

import time
import weakref

from gunicorn_passenger.errors import BadResponse, PoolExhausted, ProxyError, UpstreamClosed
from gunicorn_passenger.proxy import wire
from gunicorn_passenger.proxy.log import failed_callback, log
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.pool import Pool
from gunicorn_passenger.proxy.response_head import HEAD_LIMIT, ResponseHead
from gunicorn_passenger.proxy.routes import Backend, TargetGroup
from gunicorn_passenger.proxy.target import ServerDirectory, Target, server_target
from gunicorn_passenger.proxy.upstream_io import Runtime, runtime

#: Seconds that a target may take to respond to a check.
_SECONDS = 5.0


def start(group: TargetGroup, options: Options, servers: ServerDirectory | None) -> None:
    """Check the targets of a group until it is closed or collected."""
    token = group.checks = object()
    here = runtime()
    here.spawn(_run, weakref.ref(group), token, options, servers, here)


def _run(
    reference: weakref.ref[TargetGroup],
    token: object,
    options: Options,
    servers: ServerDirectory | None,
    here: Runtime,
) -> None:
    while (group := reference()) is not None and group.checks is token:
        try:
            backends = group.members(servers)
        except Exception as error:
            failed_callback("a round of health checks", error)
            backends = []
        del group  # it may be collected meanwhile
        for backend in backends:
            here.spawn(_check, backend, options, servers)
        here.event().wait(options.health_interval)


def _check(backend: Backend, options: Options, servers: ServerDirectory | None) -> None:
    problem = ""
    try:
        status = _request(server_target(backend.target, servers), options)
        if not 200 <= status < 400:
            problem = f"it responded with {status}"
    except PoolExhausted:
        return  # it is busy, and may serve requests all the same
    except TimeoutError:
        problem = f"it has not responded for {_SECONDS:g} s"
    except LookupError:
        problem = "no server has this name"
    except (ProxyError, OSError) as error:
        problem = str(error)
    except Exception as error:
        failed_callback(f"a health check of {backend.target}", error)
        return
    if problem:
        backend.failed_until = float("inf")
        if backend.healthy:
            log.warning(
                "proxy: %s: the health check %s failed: %s; other targets get its requests",
                backend.target,
                options.health,
                problem,
            )
    elif not backend.healthy:
        backend.failed_until = 0.0
        log.warning("proxy: %s: the health check %s succeeds again", backend.target, options.health)
    backend.healthy = not problem


def _request(target: Target, options: Options) -> int:
    """The status of the response to one check."""
    pool: Pool = options.agent.pool(target, options.dial)
    headers = {"host": ("Host", target.authority), **options.set_headers}
    head = wire.request_line("GET", options.health or "/")
    head += wire.lines_of([*headers.values(), ("Connection", "close")]) + b"\r\n"
    end = time.monotonic() + _SECONDS
    upstream = pool.acquire(new=True, wait=False)
    try:
        upstream.stream.send(head, _SECONDS)
        received = b""
        while (at := received.find(b"\r\n\r\n")) < 0:
            data = upstream.stream.recv(HEAD_LIMIT, max(end - time.monotonic(), 0.001))
            received += data
            if not data:
                raise UpstreamClosed("it closed the connection before it responded")
            if len(received) > HEAD_LIMIT:
                raise BadResponse(f"its header section has more than {HEAD_LIMIT} bytes")
        return ResponseHead(received[: at + 4], False).status
    finally:
        pool.discard(upstream)
