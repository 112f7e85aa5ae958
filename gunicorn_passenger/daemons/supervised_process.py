"""One daemon in the supervisor: its current process, its output, and how the process exited.

Process: the supervisor. Never: keep an unlimited amount of output, or decide whether a daemon is restarted.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

from gunicorn_passenger.daemons.daemon_exec import DaemonSettings, exec_daemon
from gunicorn_passenger.daemons.process_tree import processes_of

#: Bytes of a line of output; a longer line becomes several.
MAX_LINE = 4096
#: Bytes that are read from a daemon's pipe at a time.
MAX_OUTPUT = 16384
#: Reads of the rest in a daemon's pipe: more than a pipe holds.
_MAX_FINAL_READS = 64


class SupervisedProcess:
    """One daemon and its current process."""

    def __init__(self, key: str, settings: DaemonSettings, sockets: list[int], report: int | None) -> None:
        """
        :param key: the master's name for this daemon, in the environment of all its processes.
        :param report: the socket on which the daemon receives reports.
        """
        self.key = key
        self.settings = settings
        self._sockets = sockets
        self._report = report
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
        self._partial_line = b""
        #: when it is started next (monotonic seconds)
        self.start_at: float | None = None
        #: when its processes are killed, and whether that has begun
        self.kill_at: float | None = None
        self.killing = False
        #: when the supervisor checks again whether they have exited
        self.check_at = 0.0
        self.stopped_for_good = False

    def start(self) -> None:
        """Start its first process. ``failure_pipe`` tells whether it runs the program.

        :raises OSError: when there are too many processes or descriptors.
        """
        self.start_at = None
        self.status, self.failure = None, ""
        opened: list[int] = []
        supervisor = os.getpid()
        try:
            opened += os.pipe()
            opened += os.pipe()
            opened.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
            output, written, failing, failure, null = opened
            # signals to the child wait until it has restored the handlers that the supervisor ignores
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            self.pid = os.fork()
        except OSError:
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            for fd in opened:
                os.close(fd)
            raise
        if self.pid == 0:
            exec_daemon(
                self.key, self.settings, self._sockets, self._report, supervisor, null, written, failure
            )
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for fd in (written, failure, null):
            os.close(fd)
        os.set_blocking(output, False)
        os.set_blocking(failing, False)
        self.output, self.failure_pipe, self._partial_line = output, failing, b""
        self.started = time.monotonic()

    def read_failure(self) -> None:
        """The child runs the program (the pipe closes), or reports why it cannot."""
        with suppress(BlockingIOError):
            self.failure = os.read(self.failure_pipe, 4096).decode(errors="replace")
        os.close(self.failure_pipe)
        self.failure_pipe = -1

    @property
    def first_runs(self) -> bool:
        """Whether its first process runs."""
        return bool(self.pid) and self.status is None

    def processes(self) -> list[int]:
        """All its running processes."""
        return processes_of(self.pid, self.key)

    def describe_exit(self) -> str:
        """How its first process exited, for the log."""
        if self.failure:
            return self.failure
        if self.status is None:
            return "exited"
        if os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            try:
                return f"was killed by {signal.Signals(number).name}"
            except ValueError:
                return f"was killed by signal {number}"
        return f"exited with status {os.WEXITSTATUS(self.status)}"

    def read_lines(self) -> list[bytes]:
        """Read some output.

        :returns: the complete lines; at the end of the output also the last one.
        """
        try:
            data = os.read(self.output, MAX_OUTPUT)
        except BlockingIOError:
            return []
        if not data:
            return self._close_output()
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        if len(self._partial_line) > MAX_LINE:
            rest = len(self._partial_line) % MAX_LINE or MAX_LINE
            lines.append(self._partial_line[:-rest])
            self._partial_line = self._partial_line[-rest:]
        return _divide(lines)

    def read_last_lines(self) -> list[bytes]:
        """Read the rest of the output when the daemon's processes have exited, and close the pipe."""
        lines: list[bytes] = []
        for _ in range(_MAX_FINAL_READS):
            if self.output < 0:
                return lines
            lines += self.read_lines()
        return lines + self._close_output()

    def _close_output(self) -> list[bytes]:
        os.close(self.output)
        self.output = -1
        last, self._partial_line = self._partial_line, b""
        return [last] if last else []

    def close(self) -> None:
        """Close the daemon's sockets."""
        for fd in self._sockets:
            os.close(fd)
        if self._report is not None:
            os.close(self._report)
        self._sockets, self._report = [], None


def _divide(lines: list[bytes]) -> list[bytes]:
    """A long line becomes several."""
    return [line[at : at + MAX_LINE] for line in lines for at in range(0, len(line), MAX_LINE)]
