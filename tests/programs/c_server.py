"""A server that binds by itself, as one written in C does: past Python's socket module.

With FIRST=path only the worker that can create that file has it.
"""

import ctypes
import os
import socket
import struct

from answering import PORT, application  # noqa: F401 (what gunicorn serves)

libc = ctypes.CDLL(None, use_errno=True)


def listen():
    fd = libc.socket(socket.AF_INET, socket.SOCK_STREAM, 0)
    # struct sockaddr_in, ip(7)
    address = struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", PORT, socket.inet_aton("127.0.0.1"))
    if libc.bind(fd, address, len(address)) or libc.listen(fd, 5):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def first():
    try:
        os.close(os.open(os.environ["FIRST"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


if "FIRST" not in os.environ or first():
    listen()
