"""Starts the daemons of one application, restarts them, and stops them with the master.

Process: the supervisor, which the master starts (``supervisor.py``). Never: outlive the master, import
gevent or the program, or keep an unlimited amount of a daemon's output.

- The channel (``SOCK_SEQPACKET``) carries JSON objects, one in a packet: commands from the master, events to
  it. The master's end closes when the master exits or is killed: then the supervisor stops every daemon and
  exits.
- A daemon has a session of its own (setsid(2)). The kernel kills it when the supervisor dies
  (``PR_SET_PDEATHSIG``, prctl(2)), so no daemon runs without a supervisor.
- The supervisor is a "child subreaper" (prctl(2)): it becomes the parent of processes whose own parent exits.
  So all processes of the daemons are below the supervisor in the process tree, and a pid found there cannot
  have been reused by another program.
- A daemon gets its listening sockets as in sd_listen_fds(3): from descriptor 3 on, with ``LISTEN_FDS``,
  ``LISTEN_FDNAMES`` and ``LISTEN_PID``, the daemon's own pid.
"""

from __future__ import annotations

import array
import errno
import json
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress

from gunicorn_passenger.daemons.daemon_exec import PR_SET_CHILD_SUBREAPER, prctl
from gunicorn_passenger.daemons.process_tree import descendants
from gunicorn_passenger.daemons.supervised_process import MAX_OUTPUT, SupervisedProcess

#: The pause before a daemon is started again, in seconds; doubled for each quick exit in a row.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 30.0
#: Seconds after which an exit does not count as quick: the next pause is the first one again.
STEADY = 10.0
#: Seconds that a daemon has to stop after the master has exited.
MASTER_EXIT_TIMEOUT = 1.0
#: How often the supervisor checks whether the processes of a stopping daemon have exited, in seconds.
_CHECK_INTERVAL = 0.05
#: Seconds after which the supervisor leaves processes alone that SIGKILL does not end.
_STUCK = 5.0
#: Lines in one packet, which the master logs at a time.
_MAX_LINES = 100
#: Packets that wait for the master; with more of them the daemons' output stays in their pipes.
_MAX_UNSENT = 16
#: Bytes in a command of the master, and descriptors that come with it.
_MAX_PACKET = 4096
_MAX_FDS = 64


class Supervisor:
    """All daemons, and the loop that serves them."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.daemons: dict[str, SupervisedProcess] = {}
        self.unsent: deque[bytes] = deque()
        #: What the master wants stopped: lists of waves, each a list of keys. The daemons of a wave are
        #: stopped when those of the wave before it have stopped.
        self.stop_plans: list[list[list[str]]] = []
        #: whether the supervisor exits when it has no daemon left
        self.exiting = False
        self.master_exited = False
        self._wake_read, self._wake_write = os.pipe()
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)
        channel.setblocking(False)

    def run(self) -> None:
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # A signal to the whole process group also stops the master, which then stops the supervisor.
        for number in (
            signal.SIGINT,
            signal.SIGTERM,
            signal.SIGHUP,
            signal.SIGQUIT,
            signal.SIGUSR1,
            signal.SIGUSR2,
        ):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        try:
            prctl(PR_SET_CHILD_SUBREAPER, 1)
        except OSError as error:
            self.warn(
                f"processes that a daemon leaves behind cannot be found, and may continue to run: {error}"
            )
        while not (self.exiting and not self.daemons):
            self.round()
        self.kill_stragglers()
        while self.unsent and not self.master_exited:
            select.select([], [self.channel], [], 1.0)
            self.flush()

    def round(self) -> None:
        """Wait for events, and handle them."""
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        if not self.master_exited:
            poll.register(self.channel, select.POLLIN | (select.POLLOUT if self.unsent else 0))
        pipes: dict[int, SupervisedProcess] = {}
        for daemon in self.daemons.values():
            if daemon.failure_pipe >= 0:
                poll.register(daemon.failure_pipe, select.POLLIN)
                pipes[daemon.failure_pipe] = daemon
            # output that the master does not read stays in the pipe, and the daemon blocks
            if daemon.output >= 0 and len(self.unsent) < _MAX_UNSENT:
                poll.register(daemon.output, select.POLLIN)
                pipes[daemon.output] = daemon
        for fd, what in poll.poll(self.timeout()):
            if fd == self._wake_read:
                with suppress(BlockingIOError):
                    os.read(fd, 4096)
            elif fd == self.channel.fileno():
                if what & (select.POLLIN | select.POLLHUP | select.POLLERR):
                    self.read_command()
            elif fd in pipes and fd == pipes[fd].failure_pipe:
                self.read_failure(pipes[fd])
            elif fd in pipes and fd == pipes[fd].output:
                self.forward_lines(pipes[fd], pipes[fd].read_lines())
        self.reap_children()
        self.flush()
        now = time.monotonic()
        for daemon in list(self.daemons.values()):
            if daemon.start_at is not None and now >= daemon.start_at:
                self.start(daemon)
            if daemon.kill_at is not None and now >= daemon.check_at:
                self.check_exited(daemon, now)
        self.follow_stop_plans()

    def timeout(self) -> float | None:
        """Milliseconds until the next timer expires."""
        due = [d.start_at for d in self.daemons.values() if d.start_at is not None]
        wait = max(0.0, min(due) - time.monotonic()) if due else None
        if any(d.kill_at is not None for d in self.daemons.values()):
            wait = min(_CHECK_INTERVAL, _CHECK_INTERVAL if wait is None else wait)
        return None if wait is None else wait * 1000 + 1

    # --- the master ------------------------------------------------------------------------------

    def read_command(self) -> None:
        """Read and execute a command of the master."""
        room = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
        try:
            data, ancillary, _, _ = self.channel.recvmsg(_MAX_PACKET, room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        if not data:
            self.on_master_exit()
            return
        message = json.loads(data)
        if message["command"] == "start":
            self.add_daemon(message["key"], list(fds))
        elif message["command"] == "stop":
            self.stop_plans.append(message["waves"])
        else:
            self.exiting = True

    def add_daemon(self, key: str, fds: list[int]) -> None:
        """A new daemon. The descriptors: a file with its settings, its sockets, and a socket for reports."""
        with open(fds[0], "rb") as file:
            file.seek(0)
            settings = json.load(file)
        sockets = fds[1 : 1 + len(settings["names"])]
        report = fds[1 + len(sockets)] if len(fds) > 1 + len(sockets) else None
        daemon = self.daemons[key] = SupervisedProcess(key, settings, sockets, report)
        daemon.start_at = time.monotonic()

    def on_master_exit(self) -> None:
        """The master has exited: stop everything, quickly."""
        self.master_exited = self.exiting = True
        self.unsent.clear()
        for daemon in list(self.daemons.values()):
            self.stop(daemon, min(MASTER_EXIT_TIMEOUT, daemon.settings["stop_timeout"]))

    def send_event(self, message: Mapping[str, object]) -> None:
        if not self.master_exited:
            self.unsent.append(json.dumps(message, separators=(",", ":")).encode())

    def warn(self, text: str) -> None:
        self.send_event({"event": "warning", "text": text})

    def flush(self) -> None:
        while self.unsent and not self.master_exited:
            try:
                self.channel.send(self.unsent[0], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    return
                self.on_master_exit()
                return
            self.unsent.popleft()

    # --- life ------------------------------------------------------------------------------------

    def start(self, daemon: SupervisedProcess) -> None:
        try:
            daemon.start()
        except OSError as error:
            # treated as an immediate exit
            self.warn(
                f"cannot start a process for a daemon: {error.strerror}; check the limits of "
                "processes and open files"
            )
            daemon.failure = f"cannot be started: {error.strerror}"
            daemon.started = daemon.ended = time.monotonic()
            self.on_all_exited(daemon)

    def read_failure(self, daemon: SupervisedProcess) -> None:
        daemon.read_failure()
        if not daemon.failure:
            self.send_event({"event": "started", "key": daemon.key, "pid": daemon.pid})

    def reap_children(self) -> None:
        """Reap all children; those that are not the first process of a daemon were left behind by one."""
        firsts = {daemon.pid: daemon for daemon in self.daemons.values() if daemon.pid}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for each in self.daemons.values():
                each.check_at = 0.0
            daemon = firsts.get(pid)
            if daemon is not None:
                daemon.ended = time.monotonic()
                if daemon.failure_pipe >= 0:
                    self.read_failure(daemon)
                daemon.status = status
                if daemon.kill_at is not None:
                    if daemon.settings["kill_mode"] == "mixed":
                        daemon.kill_at = min(daemon.kill_at, daemon.ended)
                else:
                    # its other processes are stopped, too
                    left = daemon.processes()
                    if left and not daemon.failure:
                        self.send_event({"event": "leftover", "key": daemon.key, "count": len(left)})
                    self.stop(daemon, daemon.settings["stop_timeout"], for_good=False)

    def stop(self, daemon: SupervisedProcess, timeout: float, for_good: bool = True) -> None:
        """Send SIGTERM to a daemon, and kill the processes that are left after ``timeout`` seconds.

        With the kill mode "mixed", the first process alone gets SIGTERM, as with systemd's ``KillMode=mixed``
        (systemd.kill(5)): it stops its own children in its own way. What it leaves behind is killed.

        :param for_good: otherwise it is started again afterwards.
        """
        daemon.stopped_for_good = daemon.stopped_for_good or for_good
        daemon.start_at = None
        deadline = time.monotonic() + timeout
        if daemon.kill_at is not None:  # it is stopping already
            daemon.kill_at = min(daemon.kill_at, deadline)
            return
        daemon.kill_at, daemon.killing = deadline, False
        first_only = daemon.first_runs and daemon.settings["kill_mode"] == "mixed"
        for pid in [daemon.pid] if first_only else daemon.processes():
            with suppress(OSError):
                os.kill(pid, signal.SIGTERM)
                # a process under SIGSTOP would not receive it
                os.kill(pid, signal.SIGCONT)
        self.check_exited(daemon, time.monotonic())

    def follow_stop_plans(self) -> None:
        """Stop the daemons of each plan's first wave; the next wave is due when they have stopped."""
        for plan in self.stop_plans:
            while plan:
                for daemon in [self.daemons[key] for key in plan[0] if key in self.daemons]:
                    if not daemon.stopped_for_good:
                        self.stop(daemon, daemon.settings["stop_timeout"])
                if any(key in self.daemons for key in plan[0]):
                    break
                del plan[0]
        self.stop_plans = [plan for plan in self.stop_plans if plan]

    def check_exited(self, daemon: SupervisedProcess, now: float) -> None:
        """Check whether the processes of a stopping daemon have exited."""
        daemon.check_at = now + _CHECK_INTERVAL
        left = daemon.processes()
        if not left and not daemon.first_runs:
            self.on_all_exited(daemon)
            return
        assert daemon.kill_at is not None
        if now >= daemon.kill_at:
            if left and not daemon.killing:
                daemon.killing = True
                first_left = daemon.pid in left
                self.send_event(
                    {"event": "killing", "key": daemon.key, "count": len(left), "first": first_left}
                )
            # repeatedly: one of them may have started another in the meantime
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            if now >= daemon.kill_at + _STUCK:
                # another user's process (sudo), or one that waits for a device
                self.send_event({"event": "stuck", "key": daemon.key, "count": len(left)})
                self.on_all_exited(daemon)

    def on_all_exited(self, daemon: SupervisedProcess) -> None:
        """All its processes have exited: remove the daemon, or start it again after a pause."""
        self.forward_lines(daemon, daemon.read_last_lines())
        lived = daemon.ended - daemon.started
        was, daemon.pid, daemon.kill_at = daemon.pid, 0, None
        if daemon.stopped_for_good:
            self.remove(daemon, "stopped")
            return
        daemon.quick_exits = daemon.quick_exits + 1 if lived < STEADY else 1
        limit = daemon.settings["give_up_after"]
        died = {
            "event": "exited",
            "key": daemon.key,
            "pid": was,
            "how": daemon.describe_exit(),
            "lived": round(lived, 3),
        }
        if limit and daemon.quick_exits >= limit and lived < STEADY:
            self.send_event(died)
            self.remove(daemon, "given_up", deaths=daemon.quick_exits)
            return
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(daemon.quick_exits - 1, 20))
        self.send_event({**died, "pause": pause})
        daemon.start_at = time.monotonic() + pause

    def remove(self, daemon: SupervisedProcess, what: str, **facts: int) -> None:
        daemon.close()
        del self.daemons[daemon.key]
        self.send_event({"event": what, "key": daemon.key, **facts})

    def kill_stragglers(self) -> None:
        """Kill all processes that the daemons have left behind, before the supervisor exits."""
        deadline = time.monotonic() + 5.0
        while (left := descendants()) and time.monotonic() < deadline:
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            self.reap_children()
            time.sleep(0.01)

    def forward_lines(self, daemon: SupervisedProcess, lines: list[bytes]) -> None:
        """Send lines of output in as few packets as possible."""
        batch: list[str] = []
        size = 0
        for line in lines:
            batch.append(line.decode("utf-8", "backslashreplace"))
            size += len(line)
            if size >= MAX_OUTPUT or len(batch) >= _MAX_LINES:
                self.send_event({"event": "output", "key": daemon.key, "lines": batch})
                batch, size = [], 0
        if batch:
            self.send_event({"event": "output", "key": daemon.key, "lines": batch})
