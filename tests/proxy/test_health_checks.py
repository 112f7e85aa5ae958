"""Active health checks: which of several targets get requests, and when they begin and end."""

import gc
import weakref

import gevent
from conditions import wait_for
from free_ports import free_port
from proxy_laboratory import Origin, answer, get, request

from gunicorn_passenger.proxy import health
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.routes import TargetGroup
from gunicorn_passenger.proxy.target import parse_target


class Checked(Origin):
    """A target whose ``/health`` has the status that the test sets; other paths respond with its label."""

    status = "200 OK"

    def reply(self, message):
        return answer(self.status if message.path == "/health" else "200 OK", body=self.label)

    def checks(self):
        return [message for _, message in self.requests if message.path == "/health"]


def labels(where, count=6):
    return {get(where).text for _ in range(count)}


OPTIONS = "health='/health', health_interval=0.05, headers={'X-Token': 't'}"


def test_a_target_gets_requests_while_it_is_healthy(lab):
    one, two = free_port(), free_port()
    with Checked(one, b"one") as first, Checked(two, b"two"):
        where = lab.serve(
            f"['http://127.0.0.1:{one}', 'http://127.0.0.1:{two}'], {OPTIONS}, fail_timeout=0.01"
        )
        assert labels(where) == {b"one", b"two"}
        first.status = "503 Busy"
        lab.wait_log(f"http://127.0.0.1:{one}: the health check /health failed: it responded with 503")
        assert labels(where) == {b"two"}
        first.status = "301 Moved"
        lab.wait_log(f"http://127.0.0.1:{one}: the health check /health succeeds again")
        assert labels(where) == {b"one", b"two"}
        check = first.checks()[-1]
        assert (check.get("host"), check.get("x-token")) == ([f"127.0.0.1:{one}"], ["t"])
        # a change is logged, not each check
        assert lab.log().count("the health check") == 2


def test_when_all_targets_are_unhealthy_they_get_requests(lab):
    one, two = free_port(), free_port()
    with Checked(one) as first, Checked(two) as second:
        first.status = second.status = "500 Error"
        where = lab.serve(f"['http://127.0.0.1:{one}', 'http://127.0.0.1:{two}'], {OPTIONS}")
        get(where)
        for port in one, two:
            lab.wait_log(f"http://127.0.0.1:{port}: the health check /health failed")
        assert get(where).status == 200


def test_a_target_that_is_down(lab):
    down, up = free_port(), free_port()
    with Checked(up, b"up"):
        where = lab.serve(f"['http://127.0.0.1:{down}', 'http://127.0.0.1:{up}'], {OPTIONS}")
        assert get(where).status == 200
        lab.wait_log(f"http://127.0.0.1:{down}: the health check /health failed: connection refused")
        assert labels(where) == {b"up"}
        with Checked(down, b"down"):
            lab.wait_log(f"http://127.0.0.1:{down}: the health check /health succeeds again")
            assert labels(where) == {b"up", b"down"}


def test_checks_end_with_the_proxy(lab):
    one, two = free_port(), free_port()
    with Checked(one) as first, Checked(two):
        where = lab.serve(f"['http://127.0.0.1:{one}', 'http://127.0.0.1:{two}'], {OPTIONS}")
        get(where)
        wait_for(lambda: len(first.checks()) >= 2, "checks")
        lab.run(
            "running = lambda: sum(getattr(task, '_run', None).__name__ == '_run' and "
            "task._run.__module__.endswith('proxy.health') for task in __import__('gc').get_objects() "
            "if isinstance(task, gevent.Greenlet) and not task.dead and hasattr(task, '_run'))"
        )
        before = lab.run("running()")
        assert before >= 1
        lab.run("proxy.close()")
        wait_for(lambda: lab.run("running()") < before, "the end of the checks")


def test_one_target_is_not_checked(lab):
    port = free_port()
    with Checked(port) as origin:
        where = lab.serve(f"'http://127.0.0.1:{port}', {OPTIONS}")
        for _ in range(3):
            assert get(where, request("/x")).status == 200
        assert lab.run("proxy.proxy.route.group.checks is None")
        assert origin.checks() == []


def test_checks_do_not_keep_a_group_of_targets():
    with gevent.Timeout(60):
        options = Options().merged({"health": "/health", "health_interval": 0.01}, "here")
        group = TargetGroup([parse_target("http://127.0.0.1:9"), parse_target("http://127.0.0.2:9")])
        health.start(group, options, None)
        gone = weakref.ref(group)
        gevent.sleep(0.02)
        del group
        while gone() is not None:
            gc.collect()
            gevent.sleep(0.01)
