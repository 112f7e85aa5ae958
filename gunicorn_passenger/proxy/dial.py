"""Connects to a target.

Process: any process in which the proxy is mounted.
Never: takes longer than the caller allows, or leaves a socket behind.
"""

from __future__ import annotations

import _socket
import errno
import os
import socket
import ssl
import time
from typing import Any

from gunicorn_passenger.errors import UpstreamRefused, UpstreamTimeout
from gunicorn_passenger.proxy.target import Target
from gunicorn_passenger.proxy.tls import TlsStream
from gunicorn_passenger.proxy.upstream_io import WRITE, Runtime, Stream

#: error codes of a connection that is being made
_CONNECTING = {errno.EINPROGRESS, errno.EWOULDBLOCK}


def connect(
    target: Target,
    runtime: Runtime,
    seconds: float,
    local_address: str | None = None,
    context: ssl.SSLContext | None = None,
) -> Stream:
    """Connect to a target.

    :param seconds: how long that may take, TLS included.
    :param local_address: the address to connect from.
    :param context: for TLS.
    :raises UpstreamRefused: when it cannot be reached.
    :raises UpstreamTimeout: when that takes too long.
    """
    end = time.monotonic() + seconds
    try:
        stream = _connect_any(target, runtime, end, local_address)
    except TimeoutError:
        raise UpstreamTimeout("no connection was made in time") from None
    except socket.gaierror as error:
        raise UpstreamRefused(f"the host name does not resolve: {error.strerror}") from None
    except OSError as error:
        raise UpstreamRefused(_reason(error)) from None
    if context is None:
        return stream
    try:
        secured = TlsStream(stream, context, target.host)
        secured.handshake(max(end - time.monotonic(), 0.001))
        return secured
    except TimeoutError:
        stream.close()
        raise UpstreamTimeout("the TLS handshake was not over in time") from None
    except ssl.SSLCertVerificationError as error:
        stream.close()
        raise UpstreamRefused(f"the certificate is not trusted: {error.verify_message}") from None
    except (OSError, ValueError) as error:
        stream.close()
        raise UpstreamRefused(f"the TLS handshake failed: {_reason(error)}") from None
    except BaseException:
        stream.close()
        raise


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]


def _connect_any(target: Target, runtime: Runtime, end: float, local_address: str | None) -> Stream:
    if target.path:
        return _connect_one(runtime, socket.AF_UNIX, target.path, end, None)
    failure: OSError | None = None
    for family, _, _, _, address in runtime.resolve(target.host, target.port, end - time.monotonic()):
        if local_address is not None and (family == socket.AF_INET6) != (":" in local_address):
            continue
        try:
            return _connect_one(runtime, family, address, end, local_address)
        except TimeoutError:
            raise
        except OSError as error:
            failure = failure or error
    raise failure or OSError(errno.EADDRNOTAVAIL, f"no address of {target.host} fits local_address")


def _connect_one(runtime: Runtime, family: int, address: Any, end: float, local: str | None) -> Stream:
    sock = _socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    sock.setblocking(False)
    stream: Stream | None = None
    try:
        if local is not None:
            sock.bind((local, 0))
        code = sock.connect_ex(address)
        if family == socket.AF_UNIX and code == errno.EAGAIN:
            # its backlog is full, and the kernel does not report when there is room again
            code = _connect_patiently(sock, address, runtime, end)
        stream = runtime.open(sock)
        if code in _CONNECTING:
            stream.wait(WRITE, max(end - time.monotonic(), 0.001))
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return stream
    except BaseException:
        (stream or sock).close()
        raise


def _connect_patiently(sock: Any, address: Any, runtime: Runtime, end: float) -> int:
    pause = 0.001
    while True:
        runtime.event().wait(pause)
        code: int = sock.connect_ex(address)
        if code != errno.EAGAIN:
            return code
        if time.monotonic() > end:
            raise TimeoutError
        pause = min(pause * 2, 0.05)
