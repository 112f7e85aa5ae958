"""As much of a worker's registry as the sockets of its unmodified servers need, in a test's process."""

from types import SimpleNamespace

from gunicorn_passenger.interposition.leased_sockets import LeasedSockets
from gunicorn_passenger.interposition.own_fds import inode_of
from gunicorn_passenger.interposition.pending_bind import PendingBind
from gunicorn_passenger.serving.gevent_scheduler import GeventScheduler
from gunicorn_passenger.serving.port_lease import PortLease
from gunicorn_passenger.serving.third_party import ThirdPartyServer


class Log:
    def __init__(self):
        self.lines = []

    def error(self, line, *arguments):
        self.lines.append(line % arguments)


class Registry:
    def __init__(self):
        self.log, self.confirmed, self.closed, self.last_error = Log(), [], [], None
        self.worker = SimpleNamespace(primary_descriptors=set, cfg=SimpleNamespace(workers=1))
        self.broker = SimpleNamespace(confirm_pause=self.confirmed.append, scheduler=GeventScheduler())
        self.on_third_party_closed = self.closed.append


def lease(registry, *socks):
    leased = LeasedSockets(registry)
    for sock in socks:
        server = ThirdPartyServer("server", sock.getsockname(), "key")
        server.lease = PortLease(1, registry.broker.scheduler)
        bind = PendingBind("", 0, sock.getsockname(), sock.fileno(), inode_of(sock.fileno()), False, 0.0)
        leased.add(bind, sock.dup(), server, [])
    return leased
