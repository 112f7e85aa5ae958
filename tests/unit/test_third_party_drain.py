"""The search for idle connections of third-party servers."""

from types import SimpleNamespace

from gunicorn_passenger.interposition import third_party_drain


def test_the_search_for_connections_takes_a_small_part_of_the_time(monkeypatch):
    """With two million objects it takes half a second, and requests in progress wait meanwhile."""
    clock, searches = [100.0], []

    def get_objects():
        searches.append(clock[0])
        clock[0] += 0.5
        return []

    monkeypatch.setattr(third_party_drain, "gc", SimpleNamespace(get_objects=get_objects))
    monkeypatch.setattr(third_party_drain, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    connections = third_party_drain.IdleConnections()
    while clock[0] < 160:
        connections.shutdown()
        clock[0] += 0.5
    assert len(searches) == 3
