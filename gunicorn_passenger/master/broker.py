"""The port broker: answers workers that want to listen, in a thread of the master.

Runs in: the master. Must never: block (workers wait for it, and a fork waits for it), trust a
worker, or raise into the arbiter.

How it lives beside the arbiter:

- The arbiter's main thread makes each worker's channel before the fork (:meth:`Broker.prepare`,
  from ``Worker.__init__``) and tells the broker of a worker's end (``child_exit``). All else is
  done by the broker's own thread.
- The thread holds :attr:`Broker._gate` whenever it does anything but wait in ``poll``. A fork takes
  the gate first (:mod:`.fork_handlers`), so a child never inherits a lock that the thread held,
  nor a half-changed table. The wait for the gate is bounded: a broker that hangs costs the fork
  some seconds, not its life.
- In the child, everything of the master is closed; a worker keeps its own end of its own channel.
"""

from __future__ import annotations

import dataclasses
import fcntl
import ipaddress
import json
import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.address import UNIX_PATH_MAX, format_sockname, is_unix
from gunicorn_passenger.config.port_allocation import PortAllocation
from gunicorn_passenger.ipc import channel
from gunicorn_passenger.ipc.channel import (
    AcceptPaused,
    Acknowledged,
    AssignConnection,
    AssignResult,
    BootFailure,
    GetReport,
    OfferConnection,
    OfferRejected,
    OpenPort,
    PacketRejected,
    ReleasePort,
    ReportSent,
    RequestDenied,
    SuccessorReady,
    WorkerLeaving,
    WorkerReady,
)
from gunicorn_passenger.ipc.scoreboard import RetiredCounters, Scoreboard
from gunicorn_passenger.master import upgrade_lock, upgrade_state
from gunicorn_passenger.master.descriptors import Closer, is_connection
from gunicorn_passenger.master.event_log import EventLog
from gunicorn_passenger.master.listeners import BrokerOwnedListener, Listeners, Port
from gunicorn_passenger.master.placement import PlacementScheduler
from gunicorn_passenger.master.service import BrokerService
from gunicorn_passenger.serving import server_errors
from gunicorn_passenger.status import report
from gunicorn_passenger.system import listening_sockets, unpatched
from gunicorn_passenger.system.text import MAX_NAME, printable, printable_all

#: How long a fork waits for the broker to finish what it does, in seconds.
_FORK_WAIT = 5.0
#: How often an undecided close of a listener is looked at again (see Broker._settle), in seconds.
_SETTLE = 0.05
#: Seconds after which a part that has failed is called again.
_TICK_AGAIN = 1.0
#: How long the broker rests after a failure that it did not expect, in seconds.
_BREATH = 0.1
#: Characters of a client's address, as JSON.
_MAX_PEER = 1000
#: How many malformed packets of one worker are answered before its channel is closed.
_MAX_MALFORMED = 100
#: How many messages of a worker that was reaped are still read.
_LAST_WORDS = 100
#: How many different faults are logged, each once; more come from a worker that makes them up.
_MAX_FAULTS = 64


@dataclass
class WorkerChannel:
    """The master's end of one worker's channel."""

    age: int
    sock: Any
    board: Scoreboard | None = None
    #: once the arbiter has said it
    pid: int = 0
    ready: bool = False
    leaving: bool = False
    #: when it was forked (Unix time)
    started: float = field(default_factory=time.time)
    malformed: int = 0
    #: closes what the worker sends
    closer: Closer = field(default_factory=Closer)


@dataclass
class PendingWorker:
    """A worker between ``Worker.__init__`` and the fork."""

    age: int
    ours: Any
    theirs: Any
    board: Scoreboard | None
    #: the next fork is the worker's own
    armed: bool = False


def _is_peer(text: str) -> bool:
    """Whether a worker's text is an address as ``accept()`` gives one."""
    if len(text) > _MAX_PEER:
        return False
    try:
        addr = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if isinstance(addr, list):
        return (
            len(addr) in (2, 4)
            and _is_ip(addr[0])
            and all(type(part) is int and 0 <= part < 1 << 32 for part in addr[1:])
        )
    return addr is None or isinstance(addr, str)


def _is_ip(text: object) -> bool:
    if not isinstance(text, str):
        return False
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _check_text(ask: OpenPort) -> OpenPort:
    """What a worker asks for, with texts that can be logged, reported and encoded: the one place that sees to
    it.

    A host must be numeric (:mod:`.listeners`), so that only a name and a path are free text.

    :raises errors.ListenError: when a name is too long, or a path is not one.
    """
    if len(ask.name) > MAX_NAME:
        raise server_errors.server_name_too_long(ask.name, MAX_NAME)
    try:
        size = len(os.fsencode(ask.path))
    except UnicodeError:
        raise listen_errors.bad_address(
            ask.path[:100], "the path of the UNIX socket cannot be encoded"
        ) from None
    if size > UNIX_PATH_MAX:
        raise listen_errors.unix_path_too_long(ask.path[:200], UNIX_PATH_MAX)
    return dataclasses.replace(ask, name=printable(ask.name))


def _board() -> Scoreboard | None:
    try:
        return Scoreboard()
    except (OSError, ValueError):
        return None


class Broker:
    """All that the master knows of ports and of the workers that want them."""

    def __init__(self, log: Any, listening: list[Any], cfg: Any) -> None:
        self.log = log
        self.cfg = cfg
        self.arbiter: Any = None
        self.listeners = Listeners(cfg, self.log)
        self.listeners.surrendered = self._on_listener_closed
        self.history = EventLog()
        before = upgrade_state.inherited()
        upgrade_state.forget(cfg)
        ports = before.pop("ports", {})
        self.listeners.stopped = set(ports.get("stopped", ()))
        lock = upgrade_lock.UpgradeLock(before.pop("exclusive", -1))
        self.leases = PlacementScheduler(self.listeners, lock, self.history, self)
        self.tally = RetiredCounters()
        self.primary_name = ""
        self.started = time.time()
        self.allocation = PortAllocation("")
        self.grace = 10.0
        self._listening = listening
        self._links: dict[int, WorkerChannel] = {}  # by descriptor
        #: what else lives in the broker's loop
        self.parts: list[BrokerService] = []
        #: answers a daemon's questions for the report on a connected socket (see control.py); gate held
        self.watch_reports: Callable[[Any], None] | None = None
        self._embryo: PendingWorker | None = None
        self._gate = unpatched.lock()
        self._gate_taken = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._running = False
        #: when a part wants to be called again (monotonic seconds)
        self._due: float | None = None
        self._faults: set[str] = set()
        self._handed = 0  # connections that were passed on, to number them and to take turns
        #: connections on their way: number to giver, its question, and heir
        self._handing: dict[int, tuple[WorkerChannel, int, WorkerChannel]] = {}
        self._halting = 0  # age of the worker whose exit makes gunicorn halt
        self._bind: list[str] | None = None  # gunicorn's setting, while a reload goes without a part of it
        self._undecided = False  # a listener of ours was closed, and it is not known yet why
        self._expelled: set[int] = set()  # ages of workers whose channel was closed, until they are reaped
        self._gone: list[int] = []  # ages of workers that the arbiter has reaped
        self._adopt(listening, dict(ports.get("open", ())))

    # --- called by the arbiter's main thread ----------------------------------------------------

    def _adopt(self, listening: list[Any], handed: dict[str, str]) -> None:
        """Make the table and the arbiter's list agree.

        Sockets in the list that are no primary come from ``bind``, from systemd, or (``handed``)
        from the master before, whose programs had opened them; ports that a program opened and
        that a reload has left out of the list return to it.
        """
        now = time.monotonic()
        table = self.listeners.ports
        for key in [k for k, p in table.items() if p.bound and p.listener not in listening]:
            # the reload has taken it out of ``bind``
            self.listeners.cool(table.pop(key), self._ages())
            self.tally.forget(key)
        ours = [port.listener for port in table.values()]
        for listener in listening:
            key = format_sockname(listening_sockets.sockname(listener.sock))
            if listener not in ours and key in handed:
                self.listeners.adopt(listener, False, now, handed[key])
        listening[:] = [li for li in listening if li.sock.fileno() >= 0]  # adopting has replaced some
        listening.extend(
            p.listener for p in table.values() if p.listener not in listening and p.listener.sock is not None
        )
        primary = self.primary_listeners(listening)
        for listener in listening:
            if (
                listener not in primary
                and not isinstance(listener, BrokerOwnedListener)
                and listener not in ours
            ):
                self.listeners.adopt(listener, True, now)
        self._listening = self.listeners.binds = listening

    @staticmethod
    def primary_listeners(listening: list[Any]) -> list[Any]:
        """The listeners of the primary: the UNIX ones, or else the first; none that a program opened."""
        binds = [li for li in listening if not isinstance(li, BrokerOwnedListener)]
        return [li for li in binds if li.sock is not None and is_unix(li.getsockname())] or binds[:1]

    @contextmanager
    def _hold(self) -> Iterator[None]:
        """The gate, for the main thread, which must not wait for ever.

        :raises TimeoutError: the broker's thread hangs.
        """
        if not self._gate.acquire(True, _FORK_WAIT):
            raise TimeoutError("the port broker hangs")
        try:
            yield
        finally:
            self._gate.release()

    def configure(self, cfg: Any, allocation: PortAllocation, grace: float) -> None:
        """Take the settings of the start, or of a reload."""
        with self._hold():
            self.cfg = self.listeners.cfg = cfg
            self.allocation = allocation
            self.grace = grace
            self._faults.clear()

    def prepare(self, age: int, listening: list[Any]) -> Any:
        """Make the channel of a worker that is about to be forked.

        :returns: the worker's end, and its board (``None`` when the system has no memory for one).
        :raises OSError: when the system gives no socketpair, or the broker's thread hangs.
        """
        with self._hold():
            self._drop_embryo()
            if listening is not self._listening:
                # a reload has changed ``bind``: gunicorn made a new list, without our ports
                self._adopt(listening, {})
                self._restore_bind()
            ours, theirs = channel.pair()
            ours.setblocking(False)
            self._embryo = PendingWorker(age, ours, theirs, _board())
        self._start()
        return theirs, self._embryo.board

    def arm(self) -> None:
        """The very next fork is that of the worker last prepared (gunicorn's ``pre_fork``)."""
        if self._embryo is not None:
            self._embryo.armed = True

    def reaped(self, age: int) -> None:
        """The arbiter has reaped a worker; its channel may live on in the worker's own children."""
        self._gone.append(age)
        self._wake()

    def export_state(self, lowest: int) -> dict[str, Any]:
        """In the child that is about to become the next master: what that must know (see
        :mod:`.upgrade_state`).

        :param lowest: the lowest number that a descriptor for it may have.
        :raises OSError: when this process has no room for it.
        """
        return {
            "ports": self.listeners.export_state(),
            "exclusive": self.leases.exclusive.hand_over(lowest),
        }

    def number_listeners(self) -> None:
        """The same child: with systemd's protocol the listeners are numbered from 3 on (sd_listen_fds(3))."""
        arbiter = self.arbiter
        if arbiter.systemd:
            first, count = 3, len(arbiter.LISTENERS)
            spare = [fcntl.fcntl(li.fileno(), fcntl.F_DUPFD, first + count) for li in arbiter.LISTENERS]
            for number, fd in enumerate(spare, first):
                os.dup2(fd, number, inheritable=True)
                os.close(fd)

    def _drop_embryo(self) -> None:
        if self._embryo is not None:
            self._embryo.ours.close()
            self._embryo.theirs.close()
            if self._embryo.board is not None:
                self._embryo.board.close()
            self._embryo = None

    def _start(self) -> None:
        if self._running:
            self._wake()
            return
        self._running = True
        try:
            unpatched.start_thread(self._run)
        except RuntimeError as error:
            self._running = False
            self.log.error(
                "gunicorn-passenger: the port broker cannot start (%s): the primary is served, "
                "ports asked for with listen() are not",
                error,
            )

    def add(self, part: BrokerService) -> None:
        """Look after something more from now on."""
        with self._hold():
            self.parts.append(part)
        self._start()

    # --- what it all looks like ------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """The application as it is now, for people and for programs (see :mod:`.report`). Gate held."""
        found = report.report(self, self._links.values(), self.primary_listeners(self._listening))
        for part in self.parts:
            found |= part.report()
        found["ports"] = report.ports(self, found.get("daemons", ()))
        # the one place where what leaves in a report is made fit for terminals, pages and UTF-8
        cleaned: dict[str, Any] = printable_all(found)
        return cleaned

    def command(self, verb: str, name: str) -> str:
        """``"restart"`` or ``"stop"`` the servers or the daemon of a name. Gate held.

        :returns: what was done, for people.
        :raises PassengerError: when nothing has that name, or it cannot be done.
        """
        found = [
            done
            for done in (self.leases.command(verb, name), *(p.command(verb, name) for p in self.parts))
            if done is not None
        ]
        if not found:
            raise server_errors.unknown_name(name)
        self._wake()
        return printable(", ".join(found))

    def _hand(self, link: WorkerChannel, message: OfferConnection, fd: int | None) -> None:
        """Pass a connection on to a sibling that serves the same."""
        port = self.listeners.ports.get(message.key)
        ages = port.accepting if port is not None else {li.age for li in self._links.values()}
        heirs = sorted(age for age in ages if age != link.age and self.serving(age) and not self.stopping())
        asked = any(giver is link for giver, _, _ in self._handing.values())
        is_client = fd is not None and is_connection(fd) and _is_peer(message.addr)
        if heirs and not asked and is_client and len(message.key) <= channel.MAX_KEY:
            self._handed += 1
            heir = self._link(heirs[self._handed % len(heirs)])
            assert heir is not None
            try:
                channel.send(heir.sock, AssignConnection(self._handed, message.key, message.addr), fd)
            except (BlockingIOError, channel.ChannelClosed, OSError):
                pass  # it is gone, or has enough to do: both show elsewhere
            else:
                self._handing[self._handed] = link, message.id, heir
                return
        self._answer(link, OfferRejected(message.id))

    def _adopted(self, heir: WorkerChannel, message: AssignResult) -> None:
        """An heir serves the connection that it was sent, or cannot."""
        giver, number, asked = self._handing.get(message.id, (None, 0, None))
        if giver is None or asked is not heir:
            return
        del self._handing[message.id]
        self._answer(giver, Acknowledged(number, False) if message.taken else OfferRejected(number))

    def _abort_offers(self, link: WorkerChannel) -> None:
        """A worker is gone: what it was to adopt is still the giver's."""
        for key, (giver, number, heir) in list(self._handing.items()):
            if link in (giver, heir):
                del self._handing[key]
                if heir is link and giver.sock.fileno() >= 0:
                    self._answer(giver, OfferRejected(number))

    def _tell_report(self, link: WorkerChannel, ask: GetReport) -> None:
        """The report in a file of memory, since a packet has an end."""
        try:
            fd = os.memfd_create("gunicorn-passenger-report")
        except OSError as error:
            self._answer(
                link, RequestDenied(ask.id, "listen", error.errno or 0, f"no report: {error.strerror}")
            )
            return
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(json.dumps(self.report()).encode())
        except Exception as error:
            # the worker that asks has no part in it, and would ask again after a restart
            self.log.exception("gunicorn-passenger: the report failed")
            self._answer(
                link,
                RequestDenied(
                    ask.id, "listen", getattr(error, "errno", None) or 0, f"no report: {error}"[:1000]
                ),
            )
        else:
            self._answer(link, ReportSent(ask.id), fd)
        finally:
            os.close(fd)

    # --- around a fork ---------------------------------------------------------------------------

    def before_fork(self) -> None:
        self._gate_taken = self._gate.acquire(True, _FORK_WAIT)
        if not self._gate_taken:
            self.log.error("gunicorn-passenger: the port broker hangs; forking without waiting for it")

    def after_fork_in_parent(self) -> None:
        embryo = self._embryo
        if embryo is not None and embryo.armed:
            embryo.theirs.close()
            self._links[embryo.ours.fileno()] = WorkerChannel(embryo.age, embryo.ours, embryo.board)
            self._embryo = None
        if self._gate_taken:
            self._gate.release()
        self._wake()

    def after_fork_in_child(self) -> bool:
        """Close what is the master's. The ports themselves are closed by the worker (it may be an exec).

        :returns: whether the child is a worker.
        """
        embryo, self._embryo = self._embryo, None
        if embryo is not None:
            embryo.ours.close()
            if not embryo.armed:
                embryo.theirs.close()
        for link in self._links.values():
            link.sock.close()
            if link.board is not None:
                link.board.close()
        self._links.clear()
        for part in self.parts:
            part.forked()
        self.parts = []
        if embryo is not None and embryo.armed:
            # a worker that outlives the master must not keep the lock of another's
            self.leases.exclusive.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._wake_read = self._wake_write = -1
        self._running = False
        if self._gate_taken:
            self._gate.release()
        return embryo is not None and embryo.armed

    # --- the broker's thread ---------------------------------------------------------------------

    def _wake(self) -> None:
        with suppress(OSError):
            os.write(self._wake_write, b".")

    def _run(self) -> None:
        try:
            while True:
                try:
                    self._round()
                except Exception:
                    # the table is changed in single steps, so that the next round finds it whole
                    self.log.exception("gunicorn-passenger: the port broker failed and goes on")
                    time.sleep(_BREATH)
        except BaseException as error:
            self.log.error(
                "gunicorn-passenger: the port broker's thread has died (%r) and is started again", error
            )
            time.sleep(_BREATH)
        finally:
            self._revive()

    def _revive(self) -> None:
        """Start the thread again, after its death: with what is really open, and who is really there."""
        self._running = False
        with self._gate:
            self.listeners.rebuild(self._listening)
            self.history.note("broker", "the thread of the port broker died and was started again")
        self._start()

    def _round(self) -> None:
        poll = unpatched.poll()
        with self._gate:
            poll.register(self._wake_read, select.POLLIN)
            for fd in self._links:
                poll.register(fd, select.POLLIN)
            theirs = {}
            for part in self.parts:
                for fd, wanted in part.descriptors().items():
                    theirs[fd] = part
                    poll.register(fd, wanted)
            wait = self._next_deadline()
        events = poll.poll(None if wait is None else max(0.0, wait) * 1000 + 1)
        with self._gate:
            for fd, what in events:
                if fd == self._wake_read:
                    with suppress(BlockingIOError):
                        while len(os.read(fd, 4096)) == 4096:
                            pass
                elif fd in self._links:
                    self._serve(self._links[fd])
                elif fd in theirs:
                    self._serve_part(theirs[fd], fd, what)
            while self._gone:
                age = self._gone.pop()
                for link in [li for li in self._links.values() if li.age == age]:
                    self._serve_rest(link)
                    self._leave(link)
                if age in self._expelled:
                    self._expelled.discard(age)
                    self.leases.gone(age)
            self._settle()
            self._close_idle()
            now = time.monotonic()
            due = [self.leases.settle(now), *(self._tick_part(part, now) for part in self.parts)]
            self._due = min((at for at in due if at is not None), default=None)

    def _serve_part(self, part: BrokerService, fd: int, what: int) -> None:
        """What fails in a part is not the workers' to wait for, who come after it in this round."""
        try:
            part.serve(fd, what)
        except Exception:
            self.log.exception(
                "gunicorn-passenger: the port broker failed at %s and goes on", type(part).__name__
            )

    def _tick_part(self, part: BrokerService, now: float) -> float | None:
        """What fails in a part is tried again, and not at once: each round would fail."""
        try:
            return part.tick(now)
        except Exception:
            self.log.exception(
                "gunicorn-passenger: the port broker failed at %s and goes on", type(part).__name__
            )
            return now + _TICK_AGAIN

    def _serve_rest(self, link: WorkerChannel) -> None:
        """A worker was reaped: hear what it had to say at last."""
        for _ in range(_LAST_WORDS):
            fd = link.sock.fileno()
            if self._links.get(fd) is not link or not unpatched.is_readable(fd):
                return
            self._serve(link)

    def _hear(self, link: WorkerChannel) -> None:
        fd = None
        try:
            message, fd = channel.receive(link.sock, link.closer.close)
        except BlockingIOError:
            return
        except channel.MalformedPacket as error:
            self._malformed(link, error)
            return
        except (channel.ChannelClosed, OSError):
            self._leave(link)
            return
        try:
            self._act(link, message, fd)
        except Exception:
            # A mistake of ours that this worker's messages lead to. It would lead to it again and again, and
            # all other workers need this thread: so it costs the worker its channel.
            self.log.exception(
                "gunicorn-passenger: the port broker failed at a %s message of worker %s and closes its "
                "channel",
                type(message).__name__,
                self.pid(link.age),
            )
            self._leave(link, expelled=True)
        finally:
            if fd is not None:
                link.closer.close(fd)

    def _serve(self, link: WorkerChannel) -> None:
        """Answer one packet of a worker."""
        self._hear(link)
        if link.closer.full:
            self.log.error(
                "gunicorn-passenger: worker %s sends descriptors faster than the master can close them; "
                "the master closes its channel",
                self.pid(link.age),
            )
            self._leave(link, expelled=True)

    def _act(self, link: WorkerChannel, message: channel.Message, fd: int | None) -> None:
        """Do what a worker's message says.

        :param fd: the descriptor that came with it, which stays the caller's.
        """
        if isinstance(message, OfferConnection):
            self._hand(link, message, fd)
        elif isinstance(message, OpenPort):
            self._open(link, message)
        elif isinstance(message, ReleasePort):
            self.leases.release(link.age, message.key, message.id)
        elif isinstance(message, AcceptPaused):
            self.leases.paused(link.age, message.key)
        elif isinstance(message, AssignResult):
            self._adopted(link, message)
        elif isinstance(message, WorkerReady):
            link.ready = True
            self.pid(link.age)
            self.primary_name = printable(message.primary[:MAX_NAME]) or self.primary_name
            for other in [li for li in self._links.values() if li.leaving]:
                self._answer(other, SuccessorReady(0))
            self._warn_unclaimed()
        elif isinstance(message, WorkerLeaving):
            link.leaving = True
            self.leases.leaving(link.age)
            self._answer(link, Acknowledged(message.id, False))
            if any(self.serving(li.age) for li in self._links.values()) and not self.stopping():
                self._answer(link, SuccessorReady(0))
        elif isinstance(message, GetReport):
            self._tell_report(link, message)
        elif isinstance(message, BootFailure):
            if self.stopping():  # what a worker cannot have any more is no news, and nothing to halt for
                self._answer(link, Acknowledged(message.id, False))
                return
            self._fault(message.text)
            self._halting = self._halting or link.age
            self._answer(link, Acknowledged(message.id, self._halting == link.age))
        else:
            self._dispatch_to_services(link, message)

    def _dispatch_to_services(self, link: WorkerChannel, message: channel.Message) -> None:
        for part in self.parts:
            answer = part.message(link.age, message)
            if answer is not None:
                self._answer(link, answer)
                return
        self._malformed(
            link, channel.MalformedPacket(f"{type(message).__name__} is the master's", message.id)
        )

    def _warn_unclaimed(self) -> None:
        """Once a program is ready: name the binds that it has left waiting."""
        for port in self.listeners.ports.values():
            if port.bound and not port.claimed:
                port.claimed = True
                self.log.warning(
                    "%s is in gunicorn's bind, but no server of the program listens on it: "
                    "call listen() on it or take it out of bind",
                    port.key,
                )

    def _malformed(self, link: WorkerChannel, error: channel.MalformedPacket) -> None:
        link.malformed += 1
        self.log.warning(
            "gunicorn-passenger: worker %s sent a message that is none: %s", self.pid(link.age), error
        )
        if link.malformed >= _MAX_MALFORMED:
            self.log.error(
                "gunicorn-passenger: closing the channel of worker %s after %d such messages",
                self.pid(link.age),
                link.malformed,
            )
            self._leave(link, expelled=True)
            return
        self._answer(link, PacketRejected(error.id, str(error)))

    def _open(self, link: WorkerChannel, ask: OpenPort) -> None:
        if self.stopping():
            self._answer(link, RequestDenied(ask.id, "listen", 0, "the application is stopping"))
            return
        same_user = self.cfg.uid == os.geteuid()
        try:
            ask = _check_text(ask)
            opened = self.leases.want(link.age, ask, self.allocation, same_user, self._workers())
        except errors.ListenError as error:
            answer = RequestDenied(ask.id, errors.refusal_kind(error), error.errno or 0, str(error)[:1000])
            self._answer(link, answer)
            return
        except Exception as error:
            # whatever a worker asks for, it is answered
            text = f"the master cannot open what was asked for: {error}"
            self.log.error("gunicorn-passenger: worker %s: %s", self.pid(link.age), text[:1000])
            self._answer(
                link, RequestDenied(ask.id, "listen", getattr(error, "errno", None) or 0, text[:1000])
            )
            return
        self._answer(link, opened)

    def _workers(self) -> int:
        """How many workers there are to be."""
        arbiter = self.arbiter
        return int(arbiter.num_workers if arbiter is not None else self.cfg.workers)

    # --- what the leases ask ---------------------------------------------------------------------

    def _ages(self) -> list[int]:
        return [link.age for link in self._links.values()]

    def _link(self, age: int) -> WorkerChannel | None:
        return next((link for link in self._links.values() if link.age == age), None)

    def serving(self, age: int) -> bool:
        link = self._link(age)
        return link is not None and link.ready and not link.leaving

    def tell(self, age: int, message: channel.Message, fd: int | None = None) -> bool:
        link = self._link(age)
        return link is not None and self._answer(link, message, fd)

    def opened(self, port: Port) -> None:
        self._listening.append(port.listener)
        self.log.info("Opened %s for the workers", port.key)

    def shut(self, port: Port) -> None:
        with suppress(ValueError):
            self._listening.remove(port.listener)
        port.listener.close_now()
        self.log.info("Closed %s: it was stopped", port.key)

    def reopen(self, port: Port) -> None:
        self.listeners.reopen(port)
        self._listening.append(port.listener)
        self.log.info("Opened %s again", port.key)

    def _answer(self, link: WorkerChannel, message: channel.Message, fd: int | None = None) -> bool:
        try:
            channel.send(link.sock, message, fd)
        except (BlockingIOError, channel.ChannelClosed, OSError) as error:
            silent = isinstance(error, BlockingIOError)
            if silent:
                self.log.error(
                    "gunicorn-passenger: worker %s does not read its channel; closing it", self.pid(link.age)
                )
            self._leave(link, expelled=silent)
            return False
        return True

    def _fault(self, text: str) -> None:
        """Log what several workers report alike, once."""
        if text in self._faults or len(self._faults) >= _MAX_FAULTS:
            return
        self._faults.add(text)
        self.log.error("%s", " ".join(text.split()))

    def _leave(self, link: WorkerChannel, expelled: bool = False) -> None:
        """A worker is gone: close its channel and forget its wishes.

        :param expelled: whether it lives, and its channel is closed since it cannot be talked to. It leaves
            when it sees that, and gunicorn replaces it.
        """
        pid = self.pid(link.age)
        if self._links.pop(link.sock.fileno(), None) is None:
            return
        link.closer.close_socket(link.sock)
        self.tally.gone(link.board, self.listeners.ports.values())
        self._abort_offers(link)
        self.listeners.cooled(link.age)
        if expelled:
            # it may accept until it hears of it: its leases move when it is reaped
            self._expelled.add(link.age)
        else:
            self.leases.gone(link.age)
        if link.ready and not link.leaving and not self.stopping():
            self.history.note("crash", f"worker {pid} is gone without having finished")
        for part in self.parts:
            part.left(link.age)

    def pid(self, age: int) -> object:
        workers = dict(self.arbiter.WORKERS) if self.arbiter is not None else {}
        link = self._link(age)
        found = next((pid for pid, worker in workers.items() if worker.age == age), None)
        if link is not None:
            # the arbiter forgets a worker before its end is told
            link.pid = found or link.pid
            found = link.pid
        return found or f"number {age}"

    # --- closing ---------------------------------------------------------------------------------

    def _on_listener_closed(self) -> None:
        """The arbiter closes a listener of ours: to stop, or since a reload changes ``bind``."""
        arbiter = self.arbiter
        if not self._undecided and arbiter is not None and arbiter.cfg is not self.cfg:
            self._strip_owned_binds(arbiter.cfg)
        self._undecided = True
        self._wake()

    def _strip_owned_binds(self, cfg: Any) -> None:
        """A reload may name a port in ``bind`` that a program has open: gunicorn need not open it again.

        It could not, since the workers of before still hold it. So it is taken out of ``bind`` until
        gunicorn has opened the rest.
        """
        named = [format_sockname(a) if isinstance(a, tuple | str) else "" for a in cfg.address]
        binds = cfg.settings["bind"].get()
        kept = [bind for bind, key in zip(binds, named, strict=True) if key not in self.listeners.ports]
        if kept and kept != binds:
            self._bind = binds
            cfg.set("bind", kept)
            for key in named:
                if key in self.listeners.ports:
                    self.listeners.ports[key].claimed = True

    def _restore_bind(self) -> None:
        if self._bind is not None and self.arbiter is not None:
            self.arbiter.cfg.set("bind", self._bind)
            self._bind = None

    def stopping(self) -> bool:
        """Whether the arbiter has closed everything and waits for its workers to leave."""
        arbiter = self.arbiter
        return arbiter is not None and not arbiter.LISTENERS and self._listening is not arbiter.LISTENERS

    def _settle(self) -> None:
        """Find out which of the two it was.

        ``Arbiter.stop`` replaces its list by an empty one right after closing: then the ports are
        closed. ``Arbiter.reload`` replaces it by the new binds: then they stay, and join that list
        with the next worker (:meth:`prepare`). Until it has done either, nothing is decided.
        """
        if not self._undecided or self.arbiter is None or self._listening is self.arbiter.LISTENERS:
            return
        self._undecided = False
        if not self.arbiter.LISTENERS:
            self._close_all()

    def _close_all(self) -> None:
        arbiter = self.arbiter
        ours = not (arbiter.reexec_pid or arbiter.master_pid or arbiter.systemd)
        for key, port in list(self.listeners.ports.items()):
            if isinstance(port.listener, BrokerOwnedListener):
                self.leases.dropped(port)
                self.listeners.drop(key, ours, self._ages())
        self.leases.stop()

    def finish(self) -> None:
        """gunicorn exits: whatever the thread has not closed yet."""
        for part in self.parts:
            part.stop()
        with suppress(TimeoutError), self._hold():
            self._close_all()

    def _close_idle(self) -> None:
        """Close ports that nobody has wanted for the grace period.

        The clock stands still while a worker boots, however long its imports take: it may be
        about to ask for the port, and a reload must never close one.
        """
        now = time.monotonic()
        settled = bool(self._links) and all(link.ready for link in self._links.values())
        for port in list(self.listeners.ports.values()):
            if port.bound:
                continue
            if port.wanted_by or not settled:
                port.idle_since = None
            elif port.idle_since is None:
                port.idle_since = now
            elif now - port.idle_since >= self.grace:
                self._close_port(port)

    def _close_port(self, port: Port) -> None:
        with suppress(ValueError):
            self._listening.remove(port.listener)
        arbiter = self.arbiter
        handed_on = arbiter is not None and (arbiter.reexec_pid or arbiter.master_pid)
        self.leases.dropped(port)
        self.listeners.drop(port.key, not handed_on, self._ages())
        self.tally.forget(port.key)
        self.log.info("Closed %s: no worker has wanted it for %g s", port.key, self.grace)

    def _next_deadline(self) -> float | None:
        if self._undecided:
            return _SETTLE
        now = time.monotonic()
        waits = [
            port.idle_since + self.grace - now
            for port in self.listeners.ports.values()
            if port.idle_since is not None
        ]
        if self._due is not None:
            waits.append(self._due - now)
        return min(waits, default=None)
