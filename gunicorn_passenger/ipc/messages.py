"""The messages between the master and a worker: one list, with a version.

Process: the master and a worker. Never: decide or send anything; a message is only data.

A message's name says what is done to what: a verb and a noun for a request or a command (``OpenPort``,
``PauseAccept``), a noun and a verb for what has happened (``PortOpened``, ``AcceptPaused``). ``id`` pairs a
request with its response.
"""

from __future__ import annotations

from typing import ClassVar

from gunicorn_passenger.config.record import Record

#: Raised when a message changes its meaning; each side rejects packets of another version.
VERSION = 1
#: Characters of a text; longer texts are cut by the sender and rejected by the receiver.
MAX_TEXT = 4096
#: Characters of a key: a UNIX path or a host with a port, and the name of a listener.
MAX_KEY = 300
#: Connections in one OfferConnections: their addresses fit in a text, and OfferSettled has a bit for each.
MAX_OFFERED = 32


class Message(Record):
    """Base of all messages. ``id`` pairs a request with its response; 0 for a message without a response."""

    id: int

    types: ClassVar[dict[str, type[Message]]] = {}
    #: how many descriptors its packet may have
    max_descriptors: ClassVar[int] = 1

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Message.types[cls.__name__] = cls


# --- from a worker to the master --------------------------------------------------------------


class OpenPort(Message):
    """The worker wants to accept on an address. Response: PortOpened or RequestDenied.

    The packet may have the descriptor of a socket that listens on the address already: the program has opened
    it without Python's socket module. The master then shares that socket.

    ``kind`` is ``"tcp"`` (numeric ``host``, ``port``), ``"auto"`` (numeric ``host``; equal servers of several
    workers have the same ``name``), ``"unix"`` (absolute ``path``), or ``"once"`` (the right to run the
    function ``name``).
    """

    kind: str
    host: str = ""
    port: int = 0
    path: str = ""
    name: str = ""
    backlog: int = 0
    v6only: bool = False
    #: with "auto": the ports that the program allows itself; empty for all that are allocated
    within: str = ""
    placement: str = "shared"
    #: whether the worker counts the server's requests
    counts: bool = True
    #: whether the worker may have it already, in a program that shares the port with itself (SO_REUSEPORT)
    again: bool = False


class ReleasePort(Message):
    """The worker no longer wants ``key``. No response.

    Without a key: the worker no longer waits for the port of its OpenPort with this ``id``.
    """

    key: str


class AcceptPaused(Message):
    """The worker has stopped accepting on ``key``, as PauseAccept said, and waits for an AcceptGranted.

    No response.
    """

    key: str


class WorkerReady(Message):
    """The worker has loaded the program and serves. No response."""

    #: the name of the primary's server
    primary: str = ""
    #: Whether the worker serves the primary itself: then also on the binds that no server of the program
    #: listens on, and it counts the requests. Otherwise the primary is a third-party server, or gunicorn's
    #: own in a worker of another class.
    serves_primary: bool = True


class KeepBind(Message):
    """The worker serves the primary on ``key`` of gunicorn's bind, unless a server of the program has it.

    Response: Acknowledged, or RequestDenied; none with the id 0.
    """

    key: str
    #: Whether no server of this worker may listen there later. Otherwise the worker gives the bind up when it
    #: receives BindClaimed.
    for_good: bool = False


class WorkerLeaving(Message):
    """The worker drains: it has stopped accepting, and finishes its open connections.

    Response: Acknowledged, after which the master assigns it no connection of a sibling.
    """


class OfferConnections(Message):
    """A draining worker offers idle connections, the packet's descriptors, to its siblings.

    Response: OfferSettled. Until then the worker must not read from them.
    """

    max_descriptors: ClassVar[int] = MAX_OFFERED
    #: which server accepted them: the key of a port, or "primary" and the listener's name
    key: str
    #: the clients' addresses, a JSON list
    addrs: str


class AssignResult(Message):
    """How many connections of the AssignConnections with this ``id`` the worker can serve.

    They are the first ones of the offer. Response: AssignSettled; until then the worker must not read from
    them.
    """

    taken: int


class OpenMailbox(Message):
    """The worker wants a mailbox, and the sending ends of its siblings'. Response: MailboxOpened.

    Its siblings know the mailbox before the worker gets the response.
    """


class ReleaseMailbox(Message):
    """The worker cannot use its mailbox: the descriptor has not reached it. No response."""


class GetReport(Message):
    """The worker asks for the application's report. Response: ReportSent or RequestDenied."""


class SpawnDaemon(Message):
    """The program wants a daemon. Response: DaemonSpawned or RequestDenied."""

    #: a JSON object, see daemons/spec.py
    spec: str


class RequestSuccessor(Message):
    """The worker has had its max_requests, or its files have changed. No response.

    The worker serves until gunicorn stops it (SIGTERM), which the master does once a successor serves. A
    repeated request says that a file has changed again, so the next boot need not wait.
    """


class BootFailure(Message):
    """The worker cannot boot. Response: BootVerdict."""

    text: str


# --- from the master to a worker --------------------------------------------------------------


class PortOpened(Message):
    """The port is open, or is going to be; AcceptGranted says when the worker may accept.

    ``key`` names the port in ReleasePort; it is empty while no port is free.
    """

    key: str
    host: str = ""
    port: int = 0
    path: str = ""
    #: whether an AcceptGranted follows at once
    granted: bool = True


class AcceptGranted(Message):
    """The worker whose OpenPort had this ``id`` may accept from now on, on the packet's descriptor."""

    key: str
    host: str = ""
    port: int = 0
    path: str = ""
    #: where the worker counts the server's connections and requests (see ipc/scoreboard.py)
    slot: int = -1
    #: with "each": the position of this port among those of the server, from 1
    position: int = 0


class BindClaimed(Message):
    """A server listens on ``key``, which is in gunicorn's bind: the primary is not served there any more.

    No response. It goes to workers that serve the primary there, and not for good (:class:`KeepBind`). The
    one that has asked for the port gets it before its PortOpened.
    """

    key: str


class SuccessorReady(Message):
    """A sibling can take the connections of this draining worker. No response."""


class OfferSettled(Message):
    """Which of the offered connections a sibling serves from now on; the worker keeps the others."""

    #: bit n is set for connection n
    taken: int


class AssignConnections(Message):
    """A sibling's idle connections for the worker: the packet's descriptors. Response: AssignResult."""

    max_descriptors: ClassVar[int] = MAX_OFFERED
    key: str
    addrs: str


class AssignSettled(Message):
    """Whether the worker serves the connections that it can serve; otherwise they are its sibling's again.

    They are when the AssignResult came too late.
    """

    serve: bool


class MailboxOpened(Message):
    """The receiving end of the worker's mailbox is the packet's descriptor; without one it has none."""

    #: names the worker in what clients get to see; no client can guess one
    tag: str
    #: signs what names a worker in a cookie; the same in all workers of a master
    key: str


class SiblingJoined(Message):
    """A sibling has a mailbox, whose sending end is the packet's descriptor. No response."""

    tag: str
    #: whether the sibling serves: it is ready, and does not drain
    serving: bool


class SiblingChanged(Message):
    """A sibling is ready, drains, or has exited. No response."""

    tag: str
    serving: bool
    gone: bool = False


class ReportSent(Message):
    """The application's report, a JSON object in the file that is the packet's descriptor."""


class DaemonSpawned(Message):
    """The daemon runs, or is going to. ``host`` and ``port``, or ``path``: where it listens, if it does."""

    name: str
    host: str = ""
    port: int = 0
    path: str = ""


class PauseAccept(Message):
    """Stop accepting on ``key``, and finish the open connections. Response: AcceptPaused."""

    key: str


class RequestDenied(Message):
    """The master denies what the worker asked for; ``kind`` is a key of ``errors.REFUSALS``."""

    kind: str
    errno: int
    text: str


class Acknowledged(Message):
    """The master has acted on the worker's message."""


class BootVerdict(Message):
    """What a worker does that cannot boot.

    ``action`` is ``"halt"``: exit with gunicorn's status for a failed boot, on which gunicorn halts;
    ``"wait"``: a sibling's exit halts gunicorn, and a second such status would abort the halt; ``"exit"``:
    other workers serve, and gunicorn continues.
    """

    action: str
    #: whether no worker has logged this failure yet
    log: bool = False


class PacketRejected(Message):
    """The packet with that ``id`` was not a message that the receiver knows."""

    text: str
