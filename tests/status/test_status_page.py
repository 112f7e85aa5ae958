"""The status page, in real Chromium, driven over the DevTools protocol."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess

import pytest
from conditions import wait_for
from free_ports import free_port
from http_client import Client, fetch
from processes import require

#: The rows of the table of servers.
SERVERS = "#servers tbody tr"

NAUGHTY = "<img src=x onerror=\"document.title='gotcha'\"><b>bold</b>"


@pytest.fixture
def served(start, port):
    """An application with the page on ``port``, and a server with a naughty name on ``second``."""
    second = free_port()
    process = start.gunicorn(
        "status_app",
        "-n",
        "shop",
        workers=2,
        env={"P1": port, "P2": second, "NAME": NAUGHTY, "SPAWN": free_port()},
    ).wait_ready()

    def complete():
        report = json.loads(fetch(port, "/status.json")[1])
        up = [daemon["state"] for daemon in report.get("daemons", [])] == ["running"]
        return up and [worker["state"] for worker in report["workers"]] == ["ready"] * 2

    def look():
        with contextlib.suppress(OSError, http.client.HTTPException):
            return complete()

    wait_for(look, "two workers and a daemon")
    process.second = second
    return process


def cell(page, column):
    """A cell of the naughty server's row."""
    return page.run(
        "[...document.querySelectorAll('#servers tbody tr')].find(r => r.cells[0].textContent.includes('bold'))"
        f".querySelector('[data-label=\"{column}\"]').textContent"
    )


def test_page(browser, served, port):
    page = browser()
    url = f"http://127.0.0.1:{port}/"
    page.open(url, shows=SERVERS)
    text = page.text()
    for pid in (served.pid, *json_pids(port)):
        assert str(pid) in text
    assert "shop" in text
    assert f"127.0.0.1:{served.second}" in text
    assert "health" in text  # the daemon
    assert page.run("document.title") == "shop: running"
    assert page.run("document.documentElement.lang") == "en"

    # a name with HTML in it is text
    assert NAUGHTY in text
    assert page.run("document.querySelectorAll('img, main b').length") == 0

    # it refreshes by itself
    assert cell(page, "Requests") == "0"
    for _ in range(3):
        fetch(served.second, "/")
    page.run("window.untouched = true")
    wait_for(lambda: cell(page, "Requests") == "3", "three requests on the page")
    assert page.run("window.untouched") is True

    wait_for(lambda: re.fullmatch(r"[\d.]+", cell(page, "Per second")), "the rate of requests")

    # nothing but this page and its report is asked for
    asked = set(page.requests())
    assert asked - {"data:,"} == {url, f"{url}status.json"}
    assert page.complaints() == []
    page.shot("desktop")


def json_pids(port):
    return [worker["pid"] for worker in json.loads(fetch(port, "/status.json")[1])["workers"]]


@pytest.mark.parametrize("width", [320, 390, 700, 930, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_overflows(browser, served, port, width, dark):
    page = browser()
    page.open(f"http://127.0.0.1:{port}/", width=width, dark=dark, shows=SERVERS)
    assert page.run("document.documentElement.scrollWidth") <= width
    outside = page.run(
        "[...document.querySelectorAll('main *')].filter(e => e.offsetParent && e.getBoundingClientRect().right > "
        f"{width} + 0.5 && !e.closest('thead')).map(e => e.outerHTML.slice(0, 200))"
    )
    assert outside == []
    if width < 500:
        assert (
            page.run(
                "Math.min(...[...document.querySelectorAll('td, dd, p')].map(e => parseFloat(getComputedStyle(e).fontSize)))"
            )
            >= 13
        )
    # what is read stands out from what it stands on (WCAG 2.1, 1.4.3)
    assert page.run(CONTRAST) == []
    page.shot(f"{width}-{'dark' if dark else 'light'}")


CONTRAST = """
(() => {
  const numbers = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => {
    const [r, g, b] = numbers(c).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const back = e => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (c !== 'rgba(0, 0, 0, 0)') return c;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.querySelectorAll('h1, h2, p, th, td, dt, dd, small, .badge, footer')]
    .filter(e => e.offsetParent && e.textContent.trim())
    .map(e => {
      const [a, b] = [light(getComputedStyle(e).color), light(back(e))].sort((x, y) => y - x);
      return [e.className, e.textContent.slice(0, 40), (a + .05) / (b + .05)];
    })
    .filter(([, , ratio]) => ratio < 4.5);
})()
"""


def test_for_a_screen_reader(browser, served, port):
    """Tables stay tables on a narrow screen, every section has a name, changes of state are said."""
    page = browser()
    page.open(f"http://127.0.0.1:{port}/", width=390, height=800, shows=SERVERS)
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = [node.get("role", {}).get("value") for node in nodes if not node.get("ignored")]
    assert roles.count("table") >= 3
    assert "row" in roles
    assert {"cell", "columnheader"} & set(roles)
    regions = {
        node["name"]["value"]
        for node in nodes
        if node.get("role", {}).get("value") == "region" and node.get("name")
    }
    assert {"Servers", "Processes", "Ports", "Recent events"} <= regions
    assert page.run("document.querySelector('#state').getAttribute('role')") == "status"
    assert page.run("document.querySelector('#lost').getAttribute('role')") == "alert"
    assert page.run("document.querySelectorAll('h1').length") == 1


def test_says_when_there_is_no_response_and_recovers(browser, start, port):
    process = start.gunicorn("status_app", "-n", "shop", workers=1, env={"P1": port}).wait_ready()
    wait_for(lambda: fetch(port, "/health")[0] == 200, "health")
    page = browser()
    page.open(f"http://127.0.0.1:{port}/", shows=SERVERS)
    assert page.run("document.querySelector('#lost').innerText") == ""
    assert process.stop() == 0
    wait_for(
        lambda: re.match(
            r"No response since \d\d:\d\d:\d\d", page.run("document.querySelector('#lost').innerText")
        ),
        "the page to say so",
    )
    assert "shop" in page.text()
    assert page.run("document.title") == "shop: no response"
    page.shot("lost")
    again = start.gunicorn("status_app", "-n", "shop", workers=1, env={"P1": port}).wait_ready()
    wait_for(lambda: page.run("document.querySelector('#lost').innerText") == "", "the page to recover")
    assert str(again.pid) in page.text()
    start.write("gunicorn.conf.py", "def (:")
    again.signal(signal.SIGHUP)
    wait_for(
        lambda: "reload failed: " in page.run("document.querySelector('#problems').innerText"), again.log
    )


@pytest.mark.parametrize("width", [390, 1200])
def test_a_failed_daemon_is_what_one_sees_first(browser, start, port, width):
    process = start.gunicorn(
        "status_app", "-n", "shop", workers=1,
        env={"P1": port, "FAILING": "false"},
    ).wait_ready()  # fmt: skip
    process.wait_log("Daemon failing is not started again")
    page = browser()
    page.open(f"http://127.0.0.1:{port}/", width=width, shows=SERVERS)
    wait_for(
        lambda: page.run("document.querySelector('#state').innerText") == "running, 1 problem", "the problem"
    )
    problem = page.run("document.querySelector('#problems').innerText")
    assert "The daemon failing has failed" in problem
    assert "gunicorn-passenger restart failing" in problem
    assert page.run("document.querySelector('#problems').getBoundingClientRect().bottom") < 500
    assert page.run("document.querySelector('#state').className") == "badge bad"
    assert page.run("document.title") == "shop: running, 1 problem"
    dates = page.run("[...document.querySelectorAll('#events td.time')].map(e => e.textContent)")
    assert dates
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", text) for text in dates), dates
    page.shot(f"failed-{width}")


def test_below_a_prefix(browser, served, port):
    page = browser()
    page.open(f"http://127.0.0.1:{served.second}/ops", shows=SERVERS)
    assert page.run("location.pathname") == "/ops/"
    wait_for(lambda: str(served.pid) in page.text(), "the report")


def test_the_policy_forbids_what_the_page_does_not_need(browser, served, port):
    client = Client(port)
    client.request("GET", "/")
    response = client.getresponse()
    body = response.read().decode()
    client.close()
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cache-Control"] == "no-store"
    assert not re.search(r"https?://", body)
    assert len(body) < 40000
    page = browser()
    page.open(f"http://127.0.0.1:{port}/", shows=SERVERS)
    page.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.injected = 1'}))"
    )
    assert page.run("window.injected") is None


def test_without_javascript_there_is_a_way_on(start, port):
    start.gunicorn("status_app", workers=1, env={"P1": port}).wait_ready()
    dom = subprocess.run(
        [require("chromium"), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={start.home}/c",
         "--virtual-time-budget=3000", "--dump-dom", f"http://127.0.0.1:{port}/"],
        capture_output=True, text=True, timeout=90, env={**os.environ, "TMPDIR": str(start.home)},
    ).stdout  # fmt: skip
    assert "<noscript>" in dom
    assert 'href="status.json"' in dom
