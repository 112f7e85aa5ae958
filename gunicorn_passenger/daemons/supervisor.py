"""The program of the supervisor's process, started by this file's path: ``python -I -S supervisor.py FD``.

Process: the supervisor. Never: import gevent or the program, or find a module of the standard library in
another directory than the interpreter's own.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback

# An isolated interpreter (-I -S) finds only the standard library; the package is found after it.
sys.path.append(os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))

from gunicorn_passenger.daemons.supervisor_loop import Supervisor


def main(channel: int) -> None:
    """:param channel: the descriptor of the channel to the master."""
    # a daemon with this descriptor could command the supervisor
    os.set_inheritable(channel, False)
    os.chdir("/")
    Supervisor(socket.socket(fileno=channel)).run()


if __name__ == "__main__":
    # The exit status is always 0: gunicorn takes any other for that of a worker.
    try:
        main(int(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(0)
