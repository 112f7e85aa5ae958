"""The channels of all workers: the master's ends, by descriptor and by age.

Process: the master, in the broker's thread and around a fork. Never: read a message.
"""

from __future__ import annotations

import _socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from gunicorn_passenger.config.gunicorn_types import Arbiter
from gunicorn_passenger.ipc import channel
from gunicorn_passenger.ipc.connection_table import ConnectionTable
from gunicorn_passenger.ipc.scoreboard import SLOTS, Scoreboard
from gunicorn_passenger.master.descriptors import Closer


@dataclass
class WorkerChannel:
    """The master's end of one worker's channel."""

    #: gunicorn's number of the worker: the younger of two workers has the higher one
    age: int
    sock: _socket.socket
    scoreboard: Scoreboard | None = None
    #: 0 until the arbiter has stored it
    pid: int = 0
    ready: bool = False
    draining: bool = False
    #: the binds beside the primary's own on which it serves the primary, and whether it does so for good
    primary_binds: dict[str, bool] = field(default_factory=dict)
    #: whether it asks for a successor
    retiring: bool = False
    #: whether it has sent a BootFailure
    failed: bool = False
    #: whether the arbiter has stopped it
    stopped: bool = False
    #: whether the log has said that it boots for longer than the overlap
    overdue: bool = False
    #: when it was forked (Unix time)
    started: float = field(default_factory=time.time)
    #: when it was forked, and when it became ready (monotonic seconds)
    forked_at: float = field(default_factory=time.monotonic)
    ready_at: float = 0.0
    #: how many packets it has sent that were not messages
    malformed: int = 0
    #: closes the descriptors that the worker sends
    closer: Closer = field(default_factory=Closer)

    @property
    def serving(self) -> bool:
        return self.ready and not self.draining

    @property
    def booting(self) -> bool:
        """Whether it may become ready."""
        return not (self.ready or self.draining or self.failed or self.stopped)


@dataclass
class PendingWorker:
    """A worker between ``Worker.__init__`` and the fork."""

    age: int
    ours: _socket.socket
    theirs: _socket.socket
    scoreboard: Scoreboard | None
    #: whether the next fork is the worker's own
    forking: bool = False


class WorkerChannels:
    """The channels of all workers of this master. Iterating gives them."""

    def __init__(self) -> None:
        self._by_fd: dict[int, WorkerChannel] = {}
        self._by_age: dict[int, WorkerChannel] = {}
        self._pending: PendingWorker | None = None
        self._table: ConnectionTable | None = None
        #: gunicorn's arbiter, once it is known
        self.arbiter: Arbiter | None = None
        #: the youngest worker before the last reload: those up to this age run the previous program
        self.previous_generation = 0
        #: whether all workers of the first start were ready at the same time
        self.started = False
        #: the name of the primary's server, once a worker is ready
        self.primary_name = ""
        #: whether its requests are counted; a third-party server's are not
        self.primary_counts = True

    def __iter__(self) -> Iterator[WorkerChannel]:
        return iter(list(self._by_fd.values()))

    def wake_arbiter(self) -> None:
        """Have the arbiter decide now which workers to start and to stop."""
        if self.arbiter is not None:
            self.arbiter.wakeup()

    def mark_stopped(self, age: int) -> None:
        """The arbiter stops a worker."""
        worker = self._by_age.get(age)
        if worker is not None:
            worker.stopped = True

    def fds_to_read(self) -> list[int]:
        """The channels that the master reads now: not one that brings more descriptors than it closes."""
        return [fd for fd, worker in self._by_fd.items() if not worker.closer.full]

    def ages(self) -> list[int]:
        return list(self._by_age)

    def by_fd(self, fd: int) -> WorkerChannel | None:
        return self._by_fd.get(fd)

    def by_age(self, age: int) -> WorkerChannel | None:
        return self._by_age.get(age)

    def is_serving(self, age: int) -> bool:
        """Whether a worker is ready and not draining."""
        worker = self._by_age.get(age)
        return worker is not None and worker.serving

    @property
    def planned(self) -> int:
        """The number of workers that gunicorn should run."""
        return int(self.arbiter.num_workers) if self.arbiter is not None else 1

    @property
    def all_ready(self) -> bool:
        """Whether no worker boots: each one that wants a port or a daemon has had the time to ask for it."""
        return all(worker.ready for worker in self) and bool(self._by_fd)

    @property
    def settled(self) -> bool:
        """Whether as many workers serve as gunicorn should run, and none boots or drains.

        Only then does a port or a daemon that no worker wants count as unused: gunicorn may start the
        successor of a draining worker, which wants it again, only when that worker has exited.
        """
        serving = [worker.serving for worker in self]
        return all(serving) and len(serving) >= max(self.planned, 1)

    def pids(self) -> dict[int, int]:
        """Each worker that gunicorn knows: age to pid."""
        workers = dict(self.arbiter.WORKERS) if self.arbiter is not None else {}
        return {worker.age: pid for pid, worker in workers.items()}

    def pid(self, age: int) -> object:
        """A worker's pid, for the log; a text where the pid is not known."""
        found = self.pids().get(age)
        worker = self._by_age.get(age)
        if worker is not None:
            # the arbiter forgets a worker before the broker learns of its exit
            worker.pid = found or worker.pid
            found = worker.pid
        return found or f"number {age}"

    def add(self, worker: WorkerChannel) -> None:
        self._by_fd[worker.sock.fileno()] = self._by_age[worker.age] = worker

    def remove(self, worker: WorkerChannel) -> bool:
        """:returns: whether it was there. The caller closes the socket afterwards."""
        if self._by_fd.pop(worker.sock.fileno(), None) is None:
            return False
        if self._by_age.get(worker.age) is worker:
            del self._by_age[worker.age]
        _leave_seat(worker.scoreboard)
        return True

    # --- around a fork ---------------------------------------------------------------------------

    def prepare(self, age: int) -> PendingWorker:
        """Make the channel of a worker that is about to be forked.

        :raises OSError: when the system gives no socketpair.
        """
        self._discard_pending()
        ours, theirs = channel.pair()
        ours.setblocking(False)
        self._pending = PendingWorker(age, ours, theirs, self._scoreboard())
        return self._pending

    def _scoreboard(self) -> Scoreboard | None:
        try:
            if self._table is None:
                self._table = ConnectionTable(SLOTS)
            scoreboard = Scoreboard()
        except (OSError, ValueError):
            # the system has no memory for it: the worker serves, and is not counted
            return None
        # last: a seat whose scoreboard cannot be made would stay taken
        scoreboard.seat = self._table.take_seat()
        return scoreboard

    def mark_forking(self) -> None:
        """The next fork is that of the worker that was prepared last."""
        if self._pending is not None:
            self._pending.forking = True

    def _discard_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.ours.close()
            pending.theirs.close()
            _leave_seat(pending.scoreboard)
            if pending.scoreboard is not None:
                pending.scoreboard.close()

    def after_fork_in_parent(self) -> None:
        pending = self._pending
        if pending is not None and pending.forking:
            self._pending = None
            pending.theirs.close()
            self.add(WorkerChannel(pending.age, pending.ours, pending.scoreboard))

    def after_fork_in_child(self) -> bool:
        """Close the master's ends of all channels.

        :returns: whether this process is a worker.
        """
        pending, self._pending = self._pending, None
        is_worker = pending is not None and pending.forking
        if pending is not None:
            # an error here would leave the stop signals of this child blocked
            with suppress(OSError):
                pending.ours.close()
            if not is_worker:
                with suppress(OSError):
                    pending.theirs.close()
        for worker in self:
            with suppress(OSError):
                worker.sock.close()
            if worker.scoreboard is not None:
                worker.scoreboard.close()
        # the tables stay: the child would copy the memory of what it frees
        return is_worker


def _leave_seat(scoreboard: Scoreboard | None) -> None:
    if scoreboard is not None and scoreboard.seat is not None:
        scoreboard.seat.leave()
