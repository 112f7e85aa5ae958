"""What the system has to leave to a benchmark: ports, and open files."""

import contextlib
import random
import resource
import socket

from . import Failed


def free_ports(count: int) -> int:
    """The first of ``count`` free ports in a row, below the range that the kernel gives to clients."""
    for _ in range(1000):
        first = random.randrange(10240, 32000 - count)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket(socket.AF_INET6)).bind(("::", port))
            return first
    raise Failed(f"no {count} free ports in a row")


def raise_file_limit(wanted: int) -> None:
    """Let this program and those that it starts open so many files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise Failed(f"{wanted} open files are needed, the limit is {hard} (ulimit -Hn)")
    soft = hard if hard != resource.RLIM_INFINITY else wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 65536), hard))
