"""The search for idle connections of third-party servers."""

from types import SimpleNamespace

import greenlet  # noqa: F401  without it there is nothing to search

from gunicorn_passenger.interposition import third_party_drain
from gunicorn_passenger.system.live_objects import live_objects


def test_the_search_for_connections_takes_a_small_part_of_the_time(monkeypatch):
    """With two million objects it takes half a second, and requests in progress wait meanwhile."""
    clock, searches = [100.0], []

    def search(_kind):
        searches.append(clock[0])
        clock[0] += 0.5
        return []

    monkeypatch.setattr(third_party_drain, "live_objects", search)
    monkeypatch.setattr(third_party_drain, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    connections = third_party_drain.IdleConnections()
    while clock[0] < 160:
        connections.shutdown()
        clock[0] += 0.5
    assert len(searches) == 3


def test_a_search_for_objects_does_not_evaluate_lazy_ones():
    """Django's ``request.user`` would query the database, and its settings raise where there are none."""

    class Lazy:
        @property
        def __class__(self):
            raise AssertionError("evaluated")

    class Wanted:
        pass

    lazy, wanted = Lazy(), Wanted()
    assert list(live_objects(Wanted)) == [wanted]
    del lazy
