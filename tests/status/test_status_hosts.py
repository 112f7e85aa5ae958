"""The hosts to which the status application responds."""

import pytest
from conditions import wait_for
from free_ports import free_port
from http_client import refused
from status_requests import get

from gunicorn_passenger import status
from gunicorn_passenger.errors import SettingError

ALLOWED = [
    "localhost", "LOCALHOST:9100", "localhost.", "shop.localhost", "127.0.0.1", "127.8.9.1:80", "[::1]:9100",
    "10.1.2.3:9100", "192.0.2.1", "[2001:db8::1]", "",
]  # fmt: skip
REFUSED = [
    "evil.example", "evil.example:9100", "localhost.evil.example", "127.0.0.1.evil.example", "notlocalhost",
    "[::1", "::1", "a b", "localhost@evil.example", "evil.example/localhost", "[::1].evil.example",
]  # fmt: skip


def asked(app, host, **more):
    """The status of an answer, and its text."""
    seen = []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "SCRIPT_NAME": "", "HTTP_HOST": host, **more}
    body = b"".join(app(environ, lambda code, headers: seen.append(code)))
    return int(seen[0][:3]), body.decode()


@pytest.mark.parametrize("host", ALLOWED)
def test_hosts_that_are_answered(host):
    assert asked(status, host)[0] == 200


@pytest.mark.parametrize("host", REFUSED)
@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/status.json", "/none"])
def test_hosts_that_are_refused(host, path):
    code, text = asked(status.application, host, PATH_INFO=path)
    assert code == 403
    assert "status(hosts=[...])" in text
    assert "PASSENGER_STATUS_HOSTS" in text
    assert len(text.splitlines()) == 1


def test_without_a_host():
    seen = []
    status({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, lambda code, headers: seen.append(code))
    assert seen == ["200 OK"]


def test_hosts_that_are_set():
    app = status(hosts=["Shop.example.org", ".internal"])
    assert asked(app, "shop.example.org:80")[0] == 200
    assert asked(app, "a.internal")[0] == 200
    assert asked(app, "b.a.internal.")[0] == 200
    assert asked(app, "internal")[0] == 403
    assert asked(app, "xshop.example.org")[0] == 403
    assert asked(app, "localhost")[0] == 200
    assert asked(status(hosts="*"), "evil.example")[0] == 200
    assert asked(status(), "evil.example")[0] == 403


@pytest.mark.parametrize(
    "hosts", [["http://x"], ["x:80"], ["a b"], 7, [7], b"x", ["x/y"], ["-"], [".", "a..b"]]
)
def test_hosts_that_cannot_be_set(hosts):
    with pytest.raises(
        SettingError, match=r"status\(hosts=...\): .* (host name|host names), such as|write names"
    ):
        status(hosts=hosts)


def test_hosts_in_an_answer_are_printable():
    _, text = asked(status, "a\x1b[31m\xc2\x9b\xe2\x80\xae")
    assert text.strip().isprintable()


def test_hosts_over_each_way_in(start, port):
    """A port of the workers' and a daemon's; a UNIX socket, where no browser connects; the environment."""
    start.write(
        "gunicorn.conf.py",
        f"from gunicorn_passenger import status\nstatus.spawn(['localhost:{port}'], hosts=['named.example'])\n",
    )
    second = free_port()
    start.write(
        "own.py",
        f"""
        import gunicorn_passenger as passenger
        from gunicorn_passenger import status
        passenger.listen({second}, status(hosts=["other.example"]))
        application = status
    """,
    )
    process = start.gunicorn(
        "own", "-c", "gunicorn.conf.py", "--chdir", start.home, workers=1,
        env={"PASSENGER_STATUS_HOSTS": "env.example, .below.example"},
    ).wait_ready()  # fmt: skip
    wait_for(lambda: not refused(port), "the daemon")
    for where, own in ((port, "named.example"), (second, "other.example")):
        for host, code in (
            ("evil.example", 403), (own, 200), ("env.example", 200), ("x.below.example", 200), ("127.0.0.1", 200),
        ):  # fmt: skip
            assert get(where, "/status.json", Host=host)[0] == code, (where, host)
    assert get(port, "/health", Host="other.example")[0] == 403
    assert get(process.socket, "/status.json", Host="evil.example")[0] == 200
    assert process.stop() == 0


def test_hosts_in_the_configuration_reach_the_workers_and_the_daemon(start, port):
    second = free_port()
    start.write(
        "gunicorn.conf.py",
        f"""\
        import gunicorn_passenger as passenger
        passenger.configure(status_hosts=["conf.example", ".below.example"])
        passenger.status.spawn({port})
        """,
    )
    start.write(
        "own.py",
        f"""\
        import gunicorn_passenger as passenger
        passenger.listen({second}, passenger.status)
        application = passenger.status
        """,
    )
    process = start.gunicorn("own", "-c", "gunicorn.conf.py", "--chdir", start.home, workers=1).wait_ready()
    wait_for(lambda: not refused(port), "the daemon")
    for where in (port, second):
        for host, code in (("conf.example", 200), ("x.below.example", 200), ("evil.example", 403)):
            assert get(where, "/status.json", Host=host)[0] == code, (where, host)
    assert process.stop() == 0


def test_hosts_in_the_environment_that_cannot_be_used(start, port):
    process = start.gunicorn("status_app", workers=1, env={"P1": port, "PASSENGER_STATUS_HOSTS": "http://x"})
    assert process.wait_end() != 0
    assert "PASSENGER_STATUS_HOSTS: 'http://x' is not a host name" in process.log()
