"""A job service: takes a line from each client and answers with the job done. Started as a daemon."""

import os
import signal
import socket
import subprocess
import sys
import time


def service(greeting="done"):
    """Serve on the socket that was handed over."""
    assert os.environ["LISTEN_PID"] == str(os.getpid())
    with socket.socket(fileno=3) as listener:
        print(f"jobs on {listener.getsockname()[1]} as {os.getuid()}:{os.getgid()}")
        while True:
            client, _ = listener.accept()
            with client, client.makefile("rw") as stream:
                job = stream.readline().strip()
                stream.write(f"{greeting} {job} {os.getpid()}\n")


def stubborn():
    """Ignores SIGTERM, and so does a child of it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "1000"])  # a child inherits what is ignored
    print(f"child {child.pid}")
    while True:
        time.sleep(1)


def family():
    """A child in its group, and a grandchild that has left it by a double fork, in a session of its own."""
    child = subprocess.Popen(["sleep", "1000"])
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        grandchild = os.fork()
        if grandchild == 0:
            os.execvpe(
                "sleep",
                ["sleep", "1000"],
                {"PATH": os.environ["PATH"]} if "BARE" in os.environ else os.environ,
            )
        os.write(writer, str(grandchild).encode())
        os._exit(0)
    print(f"family {child.pid} {os.read(reader, 20).decode()}")
    while True:
        time.sleep(1)


def leaves():
    """Goes into the background, as old daemons did."""
    read, write = os.pipe()
    if os.fork():
        os.read(read, 1)  # it is ended when this process has ended: first it prints its pid
        os._exit(0)
    print(f"left behind {os.getpid()}", flush=True)
    os.write(write, b".")
    time.sleep(1000)


def flood():
    line = "x" * 200 + "\n"
    while True:
        sys.stdout.write(line)


def talk():
    print("first line")
    sys.stderr.write("to stderr\n")
    os.write(1, b"in two ")
    time.sleep(0.3)
    os.write(1, b"parts\n\n\x1b[31mred\x1b[0m\xff\n")
    os.write(1, b"y" * 10000 + b"\n")
    os.write(1, b"no end of line")


def sleep(*_):
    print(f"sleeping {os.getpid()}")
    while True:
        time.sleep(1)


def descriptors():
    print("descriptors", sorted(int(n) for n in os.listdir("/proc/self/fd"))[:-1])
    time.sleep(1000)


def environment():
    names = "GUNICORN_PID GUNICORN_FD SERVER_SOFTWARE HOME USER COLOUR PASSENGER_DAEMON PASSENGER_CALL"
    print("environment", {name: os.environ.get(name) for name in names.split()}, os.getcwd(), os.getgroups())
    time.sleep(1000)
