"""The supervisor: starts the daemons of one application, restarts them, and stops them with the master.

Process: the supervisor, which the master starts by this file's path (``python -I -S daemons/supervisor.py
FD``), so that it imports neither gevent nor the program. Never: outlive the master, keep an unlimited amount
of a daemon's output, or import anything but the standard library. This file is over 500 lines because an
isolated interpreter (``-I``) cannot import a module beside it.

- The channel (descriptor ``FD``, ``SOCK_SEQPACKET``) carries JSON objects, one in a packet: commands from the
  master, events to it. The master's end closes when the master exits or is killed: then the supervisor stops
  every daemon and exits.
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
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from contextlib import suppress
from typing import Any

#: The pause before a daemon is started again, in seconds; doubled for each quick exit in a row.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 30.0
#: A daemon that has lived for so many seconds did not exit quickly: the next pause is the first one again.
STEADY = 10.0
#: Seconds that a daemon has to stop after the master has exited.
MASTER_EXIT_TIMEOUT = 1.0
#: How often the supervisor checks whether the processes of a stopping daemon have exited, in seconds.
_CHECK_INTERVAL = 0.05
#: Seconds after which the supervisor leaves processes alone that SIGKILL does not end.
_STUCK = 5.0
#: Bytes of a line of output; a longer line becomes several.
MAX_LINE = 4096
#: Bytes of lines in one packet.
_MAX_OUTPUT = 16384
#: Lines in one packet, which the master logs at a time.
_MAX_LINES = 100
#: Reads of the rest in a daemon's pipe: more than a pipe holds.
_MAX_FINAL_READS = 64
#: Packets that wait for the master; with more of them the daemons' output stays in their pipes.
_MAX_UNSENT = 16
#: Bytes in a command of the master, and descriptors that come with it.
_MAX_PACKET = 4096
_MAX_FDS = 64

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    """:raises OSError: when the kernel refuses."""
    if _libc.prctl(option, ctypes.c_ulong(value), *(ctypes.c_ulong(0) for _ in range(3))) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


_libc = ctypes.CDLL(None, use_errno=True)


class SupervisedProcess:
    """One daemon and its current process."""

    def __init__(self, key: str, spec: dict[str, Any], sockets: list[int], report: int | None) -> None:
        """
        :param key: the master's name for this daemon, in the environment of all its processes.
        :param spec: ``command``, ``env``, ``cwd``, ``ids`` (uid, gid, groups; or nothing), ``names`` (of the
            sockets), ``stop_timeout`` (seconds), ``kill_mode``, ``give_up_after`` (quick exits in a row).
        """
        self.key = key
        self.mark = f"PASSENGER_DAEMON_KEY={key}".encode()
        self.spec = spec
        self.sockets = sockets
        self.report = report
        self.pid = 0
        #: when its first process started and exited (monotonic seconds)
        self.started = self.ended = 0.0
        #: how the last process exited: a wait status, or why it could not start
        self.status: int | None = None
        self.failure = ""
        self.quick_exits = 0
        #: the pipe on which the child reports that it cannot run the program
        self.failure_pipe = -1
        self.output = -1
        self.partial_line = b""
        #: when it is started next (monotonic seconds)
        self.start_at: float | None = None
        #: when its processes are killed, and whether that has begun
        self.kill_at: float | None = None
        self.killing = False
        #: when the supervisor checks again whether they have exited
        self.check_at = 0.0
        self.stopped_for_good = False

    def close(self) -> None:
        for fd in self.sockets:
            os.close(fd)
        if self.report is not None:
            os.close(self.report)
        self.sockets, self.report = [], None


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
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        except OSError as error:
            self.warn(f"processes that a daemon leaves behind cannot be found: {error}")
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
                self.read_output(pipes[fd])
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
            self.add_daemon(message, list(fds))
        elif message["command"] == "stop":
            self.stop_plans.append(message["waves"])
        else:
            self.exiting = True

    def add_daemon(self, message: dict[str, Any], fds: list[int]) -> None:
        """A new daemon. The descriptors: a file with its spec, its sockets, and a socket for reports."""
        with open(fds[0], "rb") as file:
            file.seek(0)
            spec = json.load(file)
        sockets = fds[1 : 1 + len(spec["names"])]
        report = fds[1 + len(sockets)] if len(fds) > 1 + len(sockets) else None
        daemon = self.daemons[message["key"]] = SupervisedProcess(message["key"], spec, sockets, report)
        daemon.start_at = time.monotonic()

    def on_master_exit(self) -> None:
        """The master has exited: stop everything, quickly."""
        self.master_exited = self.exiting = True
        self.unsent.clear()
        for daemon in list(self.daemons.values()):
            self.stop(daemon, min(MASTER_EXIT_TIMEOUT, daemon.spec["stop_timeout"]))

    def send_event(self, message: dict[str, Any]) -> None:
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
        daemon.start_at = None
        daemon.status, daemon.failure = None, ""
        opened: list[int] = []
        me = os.getpid()
        try:
            opened += os.pipe()
            opened += os.pipe()
            opened.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
            output, written, failing, failure, null = opened
            # signals to the child wait until it has restored the handlers that the supervisor ignores
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            daemon.pid = os.fork()
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            for fd in opened:
                os.close(fd)
            # too many processes or descriptors: treated as an immediate exit
            self.warn(f"cannot start a process for a daemon: {error.strerror}")
            daemon.failure = f"cannot be started: {error.strerror}"
            daemon.started = daemon.ended = time.monotonic()
            self.on_all_exited(daemon)
            return
        if daemon.pid == 0:
            exec_daemon(daemon, me, null, written, failure)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for fd in (written, failure, null):
            os.close(fd)
        os.set_blocking(output, False)
        os.set_blocking(failing, False)
        daemon.output, daemon.failure_pipe, daemon.partial_line = output, failing, b""
        daemon.started = time.monotonic()

    def read_failure(self, daemon: SupervisedProcess) -> None:
        """The child runs the program (the pipe closes), or reports why it cannot."""
        with suppress(BlockingIOError):
            daemon.failure = os.read(daemon.failure_pipe, 4096).decode(errors="replace")
        os.close(daemon.failure_pipe)
        daemon.failure_pipe = -1
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
                    if daemon.spec["kill_mode"] == "mixed":
                        daemon.kill_at = min(daemon.kill_at, daemon.ended)
                else:
                    # its other processes are stopped, too
                    left = processes_of(daemon)
                    if left and not daemon.failure:
                        self.send_event({"event": "leftover", "key": daemon.key, "count": len(left)})
                    self.stop(daemon, daemon.spec["stop_timeout"], for_good=False)

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
        first_runs = daemon.pid and daemon.status is None
        first_only = first_runs and daemon.spec["kill_mode"] == "mixed"
        for pid in [daemon.pid] if first_only else processes_of(daemon):
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
                        self.stop(daemon, daemon.spec["stop_timeout"])
                if any(key in self.daemons for key in plan[0]):
                    break
                del plan[0]
        self.stop_plans = [plan for plan in self.stop_plans if plan]

    def check_exited(self, daemon: SupervisedProcess, now: float) -> None:
        """Check whether the processes of a stopping daemon have exited."""
        daemon.check_at = now + _CHECK_INTERVAL
        left = processes_of(daemon)
        if not left and (not daemon.pid or daemon.status is not None):
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
            # repeatedly: one of them may have started another meanwhile
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            if now >= daemon.kill_at + _STUCK:
                # another user's process (sudo), or one that waits for a device
                self.send_event({"event": "stuck", "key": daemon.key, "count": len(left)})
                self.on_all_exited(daemon)

    def on_all_exited(self, daemon: SupervisedProcess) -> None:
        """All its processes have exited: remove the daemon, or start it again after a pause."""
        self.read_output(daemon, last=True)
        lived = daemon.ended - daemon.started
        was, daemon.pid, daemon.kill_at = daemon.pid, 0, None
        if daemon.stopped_for_good:
            self.remove(daemon, "stopped")
            return
        daemon.quick_exits = daemon.quick_exits + 1 if lived < STEADY else 1
        limit = daemon.spec["give_up_after"]
        died = {
            "event": "exited",
            "key": daemon.key,
            "pid": was,
            "how": describe_exit(daemon),
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

    # --- output ----------------------------------------------------------------------------------

    def read_output(self, daemon: SupervisedProcess, last: bool = False) -> None:
        """Forward the complete lines of output, and at the end of it the rest.

        :param last: its processes have exited: read all of the output, and close the pipe.
        """
        for _ in range(_MAX_FINAL_READS):
            if daemon.output < 0:
                break
            try:
                data = os.read(daemon.output, _MAX_OUTPUT)
            except BlockingIOError:
                break
            daemon.partial_line += data
            if not data:
                self.close_output(daemon)
            *lines, daemon.partial_line = daemon.partial_line.split(b"\n")
            while len(daemon.partial_line) > MAX_LINE:
                lines.append(daemon.partial_line[:MAX_LINE])
                daemon.partial_line = daemon.partial_line[MAX_LINE:]
            if not data and daemon.partial_line:
                lines.append(daemon.partial_line)
                daemon.partial_line = b""
            self.forward_lines(daemon, lines)
            if not last:
                return
        if last and daemon.output >= 0:
            self.close_output(daemon)
            self.forward_lines(daemon, [daemon.partial_line] if daemon.partial_line else [])
            daemon.partial_line = b""

    def forward_lines(self, daemon: SupervisedProcess, lines: list[bytes]) -> None:
        """Send lines in as few packets as possible; a long line becomes several."""
        batch: list[str] = []
        size = 0
        for line in lines:
            for at in range(0, len(line), MAX_LINE):
                batch.append(line[at : at + MAX_LINE].decode("utf-8", "backslashreplace"))
                size += MAX_LINE if len(line) > MAX_LINE else len(line)
                if size >= _MAX_OUTPUT or len(batch) >= _MAX_LINES:
                    self.send_event({"event": "output", "key": daemon.key, "lines": batch})
                    batch, size = [], 0
        if batch:
            self.send_event({"event": "output", "key": daemon.key, "lines": batch})

    def close_output(self, daemon: SupervisedProcess) -> None:
        os.close(daemon.output)
        daemon.output = -1


def describe_exit(daemon: SupervisedProcess) -> str:
    """How its first process exited, for the log."""
    if daemon.failure:
        return daemon.failure
    if daemon.status is None:
        return "exited"
    if os.WIFSIGNALED(daemon.status):
        number = os.WTERMSIG(daemon.status)
        try:
            return f"was killed by {signal.Signals(number).name}"
        except ValueError:
            return f"was killed by signal {number}"
    return f"exited with status {os.WEXITSTATUS(daemon.status)}"


# --- the tree of processes -------------------------------------------------------------------------


def descendants() -> dict[int, tuple[int, int]]:
    """All running processes below the supervisor: pid -> (parent, session)."""
    table: dict[int, tuple[int, int]] = {}
    dead = set()
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        table[int(name)] = (int(fields[1]), int(fields[3]))
        if fields[0] in (b"Z", b"X"):
            dead.add(int(name))
    below: dict[int, tuple[int, int]] = {}
    found = {os.getpid()}
    while found:
        found = {pid for pid, (parent, _) in table.items() if parent in found and pid not in below}
        below.update({pid: table[pid] for pid in found})
    return {pid: facts for pid, facts in below.items() if pid not in dead}


def processes_of(daemon: SupervisedProcess) -> list[int]:
    """The processes of a daemon: of its session, with its mark in their environment, or below these."""
    below = descendants()
    found = set()
    for pid, (_, session) in below.items():
        if daemon.pid in (session, pid) or _marked(pid, daemon.mark):
            found.add(pid)
    more = found
    while more:
        more = {pid for pid, (parent, _) in below.items() if parent in more and pid not in found}
        found |= more
    return sorted(found)


def _marked(pid: int, mark: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return mark in file.read(1 << 20).split(b"\0")
    except OSError:
        return False


# --- between fork and exec -------------------------------------------------------------------------


def exec_daemon(daemon: SupervisedProcess, supervisor: int, null: int, output: int, failure: int) -> None:
    """In the child: execute the program, or report why that fails and exit."""
    what = "cannot be started"
    spec = daemon.spec
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            with suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        wanted = [null, output, output, *daemon.sockets]
        for fd in daemon.sockets:
            os.set_blocking(fd, True)  # whatever an earlier program has set
        env = spec["env"]
        env["PASSENGER_DAEMON_KEY"] = daemon.key
        if daemon.sockets:
            env["LISTEN_PID"] = str(os.getpid())
            env["LISTEN_FDS"] = str(len(daemon.sockets))
            env["LISTEN_FDNAMES"] = ":".join(spec["names"])
        if daemon.report is not None:
            env["PASSENGER_REPORT_FD"] = str(len(wanted))
            wanted.append(daemon.report)
        # first to high numbers: a source may have the number of another's target
        spare = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, len(wanted)) for fd in wanted]
        failure = fcntl.fcntl(failure, fcntl.F_DUPFD_CLOEXEC, len(wanted))
        for place, fd in enumerate(spare):
            os.dup2(fd, place, inheritable=True)
        if spec["ids"]:
            uid, gid, groups = spec["ids"]
            what = f"cannot run as user {uid} and group {gid}"
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        what = "cannot be started"
        # after the change of user, which would clear it
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(0)
        what = f"cannot enter its directory {spec['cwd']}"
        os.chdir(spec["cwd"])
        what = f"cannot run {spec['command'][0]}"
        run(spec["command"], env)
    except BaseException as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        with suppress(OSError):
            os.write(failure, f"{what}: {reason}".encode()[:2000])
    finally:
        os._exit(127)


def run(command: list[str], env: dict[str, str]) -> None:
    """Execute the command, found in ``PATH`` as by execvp(3).

    ``os.execvpe`` would import modules only now, when the daemon's user may not be able to read them.

    :raises OSError: when it cannot be run.
    """
    name = command[0]
    if "/" in name:
        os.execve(name, command, env)  # noqa: S606 - the operator or the program has named the command
    failure: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for directory in env.get("PATH", os.defpath).split(":"):
        try:
            os.execve(f"{directory or '.'}/{name}", command, env)  # noqa: S606
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            failure = error  # another directory may have an executable one
    raise failure


if __name__ == "__main__":
    # The exit status is always 0: gunicorn takes any other for that of a worker.
    try:
        # not for the daemons: a process with this descriptor can command the supervisor
        os.set_inheritable(int(sys.argv[1]), False)
        os.chdir("/")
        Supervisor(socket.socket(fileno=int(sys.argv[1]))).run()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    os._exit(0)
