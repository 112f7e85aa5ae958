"""The supervisor: starts the daemons of one application, restarts them, and ends them with the master.

Runs in: a process of its own, which the master starts by this file's path (``python -I -S
daemons/supervisor.py FD``), so that it imports neither gevent nor the program. Must never: outlive the
master, keep more than a bounded amount of a daemon's output, or import anything but the standard library.

Facts and rules:

- The channel (descriptor ``FD``, ``SOCK_SEQPACKET``) carries JSON objects, one to a packet. The master's end
  closes when the master is gone, however it went: then every daemon is ended and the supervisor exits.
- A daemon is a session of its own (setsid(2)). It gets ``SIGKILL`` when the supervisor dies
  (``PR_SET_PDEATHSIG``, prctl(2)), so that nobody is left without a supervisor.
- The supervisor is a "child subreaper" (prctl(2)): a process that a daemon has started and left becomes the
  supervisor's child, and not init's. So all that came of the daemons is below the supervisor in the tree of
  processes, and a pid found there cannot have become another's.
- Listening sockets are handed over as sd_listen_fds(3) says: from descriptor 3 on, with ``LISTEN_FDS``,
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

#: The pause before a daemon is started again, in seconds; doubled for each quick death in a row.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 30.0
#: A daemon that has lived as long, in seconds, has not died quickly: the pauses begin anew.
STEADY = 10.0
#: Seconds that a daemon has to end when the master is gone.
ORPHANED = 1.0
#: How often it is looked at whether the processes of a daemon that ends are gone, in seconds.
_LOOK = 0.05
#: Seconds after which processes that do not die of SIGKILL are left alone.
_STUCK = 5.0
#: Bytes that a line of output may have; a longer one becomes several.
MAX_LINE = 4096
#: Bytes of lines in one packet.
_MAX_BATCH = 16384
#: Lines that one packet holds: the master logs a packet in one go.
_MAX_LINES = 100
#: Reads of what a daemon has left in its pipe: more than a pipe holds.
_MAX_LAST = 64
#: Packets that wait for the master to read; with more the daemons' output is left in their pipes.
_MAX_WAITING = 16
#: Bytes in a packet of the master, and descriptors that come with it.
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
    """One daemon and its present process."""

    def __init__(self, key: str, spec: dict[str, Any], sockets: list[int], report: int | None) -> None:
        """
        :param key: the master's name for this daemon, in the environment of all its processes.
        :param spec: ``command``, ``env``, ``cwd``, ``ids`` (uid, gid, groups; or nothing), ``names`` (of the
            sockets), ``stop_timeout`` (seconds), ``give_up_after`` (quick deaths in a row).
        """
        self.key = key
        self.mark = f"PASSENGER_DAEMON_KEY={key}".encode()
        self.spec = spec
        self.sockets = sockets
        self.report = report
        self.pid = 0
        #: when its first process began and ended (monotonic seconds)
        self.started = self.ended = 0.0
        #: how the last process ended: a wait status, or what kept it from starting
        self.status: int | None = None
        self.failure = ""
        self.deaths = 0
        #: what the child says when it cannot become the program
        self.failing = -1
        self.output = -1
        self.rest = b""
        #: all that its processes have written last, while they end
        self.draining: list[int] = []
        #: when it is to be started (monotonic seconds)
        self.start_at: float | None = None
        #: when its processes are to be killed, and whether that is all
        self.kill_at: float | None = None
        self.killing = False
        #: when it is looked at again whether they are gone
        self.look_at = 0.0
        self.leaving = False

    def close(self) -> None:
        for fd in self.sockets:
            os.close(fd)
        if self.report is not None:
            os.close(self.report)
        self.sockets, self.report = [], None


class Supervisor:
    """All daemons, and the loop that looks after them."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.daemons: dict[str, SupervisedProcess] = {}
        self.waiting: deque[bytes] = deque()
        self.ending = False
        self.orphaned = False
        self._wake_read, self._wake_write = os.pipe()
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)
        channel.setblocking(False)

    def run(self) -> None:
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # Whoever stops a whole group of processes stops the master too, which then ends the supervisor.
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
            self.say({"is": "warning", "text": f"processes that leave their daemon are not found: {error}"})
        while not (self.ending and not self.daemons):
            self.round()
        self.sweep()
        while self.waiting and not self.orphaned:
            select.select([], [self.channel], [], 1.0)
            self.flush()

    def round(self) -> None:
        """Wait for something to happen, and see to it."""
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        if not self.orphaned:
            poll.register(self.channel, select.POLLIN | (select.POLLOUT if self.waiting else 0))
        pipes: dict[int, SupervisedProcess] = {}
        for daemon in self.daemons.values():
            if daemon.failing >= 0:
                poll.register(daemon.failing, select.POLLIN)
                pipes[daemon.failing] = daemon
            # output that the master does not take stays in the pipe, and its writer waits
            if daemon.output >= 0 and len(self.waiting) < _MAX_WAITING:
                poll.register(daemon.output, select.POLLIN)
                pipes[daemon.output] = daemon
        for fd, what in poll.poll(self.wait()):
            if fd == self._wake_read:
                with suppress(BlockingIOError):
                    os.read(fd, 4096)
            elif fd == self.channel.fileno():
                if what & (select.POLLIN | select.POLLHUP | select.POLLERR):
                    self.hear()
            elif fd in pipes and fd == pipes[fd].failing:
                self.heard_failure(pipes[fd])
            elif fd in pipes and fd == pipes[fd].output:
                self.read(pipes[fd])
        self.reap()
        self.flush()
        now = time.monotonic()
        for daemon in list(self.daemons.values()):
            if daemon.start_at is not None and now >= daemon.start_at:
                self.start(daemon)
            if daemon.kill_at is not None and now >= daemon.look_at:
                self.look(daemon, now)

    def wait(self) -> float | None:
        """Milliseconds until the next thing is due."""
        due = [d.start_at for d in self.daemons.values() if d.start_at is not None]
        wait = max(0.0, min(due) - time.monotonic()) if due else None
        if any(d.kill_at is not None for d in self.daemons.values()):
            wait = min(_LOOK, _LOOK if wait is None else wait)
        return None if wait is None else wait * 1000 + 1

    # --- the master ------------------------------------------------------------------------------

    def hear(self) -> None:
        """Do what the master says."""
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
            self.orphan()
            return
        message = json.loads(data)
        verb, daemon = message["do"], self.daemons.get(message.get("key", ""))
        if verb == "start":
            self.add(message, list(fds))
        elif verb == "end":
            self.ending = True
            for each in list(self.daemons.values()):
                self.end(each, each.spec["stop_timeout"])
        elif daemon is not None:  # "stop"; else it has ended meanwhile, and the master will hear of it
            self.end(daemon, daemon.spec["stop_timeout"])

    def add(self, message: dict[str, Any], fds: list[int]) -> None:
        """A new daemon: the first descriptor is a file with its spec, then its sockets, then for reports."""
        with open(fds[0], "rb") as file:
            file.seek(0)
            spec = json.load(file)
        sockets = fds[1 : 1 + len(spec["names"])]
        report = fds[1 + len(sockets)] if len(fds) > 1 + len(sockets) else None
        daemon = self.daemons[message["key"]] = SupervisedProcess(message["key"], spec, sockets, report)
        daemon.start_at = time.monotonic()

    def orphan(self) -> None:
        """The master is gone: end everything, quickly."""
        self.orphaned = self.ending = True
        self.waiting.clear()
        for daemon in list(self.daemons.values()):
            self.end(daemon, min(ORPHANED, daemon.spec["stop_timeout"]))

    def say(self, message: dict[str, Any]) -> None:
        if not self.orphaned:
            self.waiting.append(json.dumps(message, separators=(",", ":")).encode())

    def flush(self) -> None:
        while self.waiting and not self.orphaned:
            try:
                self.channel.send(self.waiting[0], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    return
                self.orphan()
                return
            self.waiting.popleft()

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
            # what is sent to the child waits until it no longer ignores what the supervisor ignores
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            daemon.pid = os.fork()
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            for fd in opened:
                os.close(fd)
            # too many processes or descriptors: as if it had died at once
            self.say({"is": "warning", "text": f"no process for a daemon: {error.strerror}"})
            daemon.failure = f"cannot be started: {error.strerror}"
            daemon.started = daemon.ended = time.monotonic()
            self.gone(daemon)
            return
        if daemon.pid == 0:
            exec_daemon(daemon, me, null, written, failure)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for fd in (written, failure, null):
            os.close(fd)
        os.set_blocking(output, False)
        os.set_blocking(failing, False)
        daemon.output, daemon.failing, daemon.rest = output, failing, b""
        daemon.started = time.monotonic()

    def heard_failure(self, daemon: SupervisedProcess) -> None:
        """The child has become the program (the pipe closes), or tells why it could not."""
        with suppress(BlockingIOError):
            daemon.failure = os.read(daemon.failing, 4096).decode(errors="replace")
        os.close(daemon.failing)
        daemon.failing = -1
        if not daemon.failure:
            self.say({"is": "started", "key": daemon.key, "pid": daemon.pid})

    def reap(self) -> None:
        """Take the ends of all children; those that are no daemon's first process were left to us."""
        firsts = {daemon.pid: daemon for daemon in self.daemons.values() if daemon.pid}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for each in self.daemons.values():
                each.look_at = 0.0
            daemon = firsts.get(pid)
            if daemon is not None:
                daemon.ended = time.monotonic()
                if daemon.failing >= 0:
                    self.heard_failure(daemon)
                daemon.status = status
                if daemon.kill_at is None:
                    # the others of its processes go with it
                    left = processes_of(daemon)
                    if left and not daemon.failure:
                        self.say({"is": "left", "key": daemon.key, "count": len(left)})
                    self.end(daemon, daemon.spec["stop_timeout"], leaving=False)

    def end(self, daemon: SupervisedProcess, timeout: float, leaving: bool = True) -> None:
        """Tell all processes of a daemon to end, and kill what is left after ``timeout`` seconds.

        :param leaving: for good; else it is started again afterwards.
        """
        daemon.leaving = daemon.leaving or leaving
        daemon.start_at = None
        deadline = time.monotonic() + timeout
        if daemon.kill_at is not None:  # it ends already
            daemon.kill_at = min(daemon.kill_at, deadline)
            return
        daemon.kill_at, daemon.killing = deadline, False
        for pid in processes_of(daemon):
            with suppress(OSError):
                os.kill(pid, signal.SIGTERM)
                # one that is stopped (SIGSTOP) would not hear of it
                os.kill(pid, signal.SIGCONT)
        self.look(daemon, time.monotonic())

    def look(self, daemon: SupervisedProcess, now: float) -> None:
        """Are the processes of a daemon that ends gone?"""
        daemon.look_at = now + _LOOK
        left = processes_of(daemon)
        if not left and (not daemon.pid or daemon.status is not None):
            self.gone(daemon)
            return
        assert daemon.kill_at is not None
        if now >= daemon.kill_at:
            if left and not daemon.killing:
                daemon.killing = True
                self.say({"is": "killed", "key": daemon.key, "count": len(left)})
            # again and again: it may have started another meanwhile
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            if now >= daemon.kill_at + _STUCK:
                # it may not be killed by us (sudo), or not at all now (a device)
                self.say({"is": "stuck", "key": daemon.key, "count": len(left)})
                self.gone(daemon)

    def gone(self, daemon: SupervisedProcess) -> None:
        """No process of it is left: forget it, or start it again after a pause."""
        self.read(daemon, last=True)
        lived = daemon.ended - daemon.started
        was, daemon.pid, daemon.kill_at = daemon.pid, 0, None
        if daemon.leaving:
            self.forget(daemon, "ended")
            return
        daemon.deaths = daemon.deaths + 1 if lived < STEADY else 1
        limit = daemon.spec["give_up_after"]
        died = {
            "is": "died",
            "key": daemon.key,
            "pid": was,
            "how": describe_exit(daemon),
            "lived": round(lived, 3),
        }
        if limit and daemon.deaths >= limit and lived < STEADY:
            self.say(died)
            self.forget(daemon, "failed", deaths=daemon.deaths)
            return
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(daemon.deaths - 1, 20))
        self.say({**died, "pause": pause})
        daemon.start_at = time.monotonic() + pause

    def forget(self, daemon: SupervisedProcess, what: str, **facts: int) -> None:
        daemon.close()
        del self.daemons[daemon.key]
        self.say({"is": what, "key": daemon.key, **facts})

    def sweep(self) -> None:
        """Kill whatever else came of the daemons; there is nobody left who would."""
        deadline = time.monotonic() + 5.0
        while (left := descendants()) and time.monotonic() < deadline:
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            self.reap()
            time.sleep(0.01)

    # --- output ----------------------------------------------------------------------------------

    def read(self, daemon: SupervisedProcess, last: bool = False) -> None:
        """Pass on the lines that are complete, and at the end the rest.

        :param last: its processes are gone: take all that is there, and close the pipe.
        """
        for _ in range(_MAX_LAST):
            if daemon.output < 0:
                break
            try:
                data = os.read(daemon.output, _MAX_BATCH)
            except BlockingIOError:
                break
            daemon.rest += data
            if not data:
                self.close_output(daemon)
            *lines, daemon.rest = daemon.rest.split(b"\n")
            while len(daemon.rest) > MAX_LINE:
                lines.append(daemon.rest[:MAX_LINE])
                daemon.rest = daemon.rest[MAX_LINE:]
            if not data and daemon.rest:
                lines.append(daemon.rest)
                daemon.rest = b""
            self.pass_on(daemon, lines)
            if not last:
                return
        if last and daemon.output >= 0:
            self.close_output(daemon)
            self.pass_on(daemon, [daemon.rest] if daemon.rest else [])
            daemon.rest = b""

    def pass_on(self, daemon: SupervisedProcess, lines: list[bytes]) -> None:
        """As few packets as possible; a long line becomes several."""
        batch: list[str] = []
        size = 0
        for line in lines:
            for at in range(0, len(line), MAX_LINE):
                batch.append(line[at : at + MAX_LINE].decode("utf-8", "backslashreplace"))
                size += MAX_LINE if len(line) > MAX_LINE else len(line)
                if size >= _MAX_BATCH or len(batch) >= _MAX_LINES:
                    self.say({"is": "lines", "key": daemon.key, "lines": batch})
                    batch, size = [], 0
        if batch:
            self.say({"is": "lines", "key": daemon.key, "lines": batch})

    def close_output(self, daemon: SupervisedProcess) -> None:
        os.close(daemon.output)
        daemon.output = -1


def describe_exit(daemon: SupervisedProcess) -> str:
    """How its first process ended, for people."""
    if daemon.failure:
        return daemon.failure
    if daemon.status is None:
        return "ended"
    if os.WIFSIGNALED(daemon.status):
        number = os.WTERMSIG(daemon.status)
        try:
            return f"was ended by {signal.Signals(number).name}"
        except ValueError:
            return f"was ended by signal {number}"
    return f"exited with status {os.WEXITSTATUS(daemon.status)}"


# --- the tree of processes -------------------------------------------------------------------------


def descendants() -> dict[int, tuple[int, int]]:
    """All processes below the supervisor that live: pid -> (parent, session)."""
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
    """The processes that came of a daemon: of its session, with its mark in their environment, or below."""
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
    """In the child: become the program, or say why not, and exit."""
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
            os.set_blocking(fd, True)  # whatever the program before has made of it
        env = spec["env"]
        env["PASSENGER_DAEMON_KEY"] = daemon.key
        if daemon.sockets:
            env["LISTEN_PID"] = str(os.getpid())
            env["LISTEN_FDS"] = str(len(daemon.sockets))
            env["LISTEN_FDNAMES"] = ":".join(spec["names"])
        if daemon.report is not None:
            env["PASSENGER_REPORT_FD"] = str(len(wanted))
            wanted.append(daemon.report)
        # out of the way first: the numbers of some are the places of others
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
        # after the change of user, which clears it
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
    """Become the command, looked for as execvp(3) does.

    ``os.execvpe`` imports what it needs for that now, where the daemon's user may not be able to read it.

    :raises OSError: when it cannot be run.
    """
    name = command[0]
    if "/" in name:
        os.execve(name, command, env)  # noqa: S606 - it is what a daemon is
    failure: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for directory in env.get("PATH", os.defpath).split(":"):
        try:
            os.execve(f"{directory or '.'}/{name}", command, env)  # noqa: S606
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            failure = error  # another directory may have one that may be run
    raise failure


if __name__ == "__main__":
    # By whatever the supervisor ends, its status is 0: gunicorn takes others for those of a worker.
    try:
        # inherited from the master, and no daemon's: whoever has it commands the supervisor
        os.set_inheritable(int(sys.argv[1]), False)
        os.chdir("/")
        Supervisor(socket.socket(fileno=int(sys.argv[1]))).run()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    os._exit(0)
