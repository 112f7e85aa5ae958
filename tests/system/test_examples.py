"""The examples, run as their READMEs say, with what the READMEs promise.

The commands and the expected output are read from the READMEs' code blocks. Two things are changed in
a copy of the example: the UNIX socket's path, and the port numbers, in README and code alike.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import socketio
import websocket
from conditions import wait_for
from example_sites import EXAMPLES, Example, assert_shown, wait_for_sharing
from free_ports import free_port, free_range
from http_client import fetch, pids_answering, refused
from processes import require
from status_commands import only


def test_every_example_is_tested():
    # proxy: in test_real_peers.py, status: in test_status_app.py
    tested = {
        "seed", "prometheus", "unmodified", "hooks", "proxy", "status", "django", "fastapi", "chat",
        "health", "jobs", "docker", "events",
    }  # fmt: skip
    assert {path.name for path in EXAMPLES.iterdir() if any(path.glob("*.py"))} == tested
    for name in tested:
        assert (EXAMPLES / name / "README.md").exists()


# --- seed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["SIGTERM", "Ctrl-C"])
def test_seed(start, port, ending):
    example = Example(start, "seed", {9000: port})
    process = example.serve(port)
    (opened,) = example.promises("gunicorn -k")
    assert process.log().count(opened) == 1
    assert f":{port} " in opened
    for command in ("curl --unix-socket", f"curl http://localhost:{port}"):
        output = example.ask(command)
        assert_shown(example.promises(command), output)
        headers = json.loads(output.partition("\n")[2])
        assert headers["user-agent"].startswith("curl/")
    assert f'"host": "localhost:{port}"' in output
    if ending == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # a terminal signals the workers as well
        assert process.wait_end() == 0, process.log()
    else:
        assert process.stop() == 0, process.log()
    assert refused(port)
    assert not os.path.exists(process.socket)
    # on Ctrl-C gunicorn may complain of a worker that was faster to leave than its own signal
    log = re.sub(r".* was sent SIGQUIT!", "", process.log()) if ending == "Ctrl-C" else process.log()
    assert not re.search("WARNING|ERROR|Traceback", log), log


def test_seed_survives_its_workers(start, port):
    example = Example(start, "seed", {9000: port})
    process = example.serve(port)
    for pid in process.workers():
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: pid not in process.workers() and len(process.workers()) == 4, "a new worker")
        assert "request successfully proxied!" in example.ask("curl --unix-socket")
    process.hup(4)
    assert "request successfully proxied!" in example.ask("curl --unix-socket")
    assert process.log().count(f"Opened 127.0.0.1:{port} ") == 1


def test_seed_with_plain_python(start, port):
    first = free_port()
    example = Example(start, "seed", {9000: port})
    assert "`python app.py`" in (example.directory / "README.md").read_text()
    process = start.python("app.py", cwd=example.directory, env=example.env | {"PORT": first}).wait_ready(
        first
    )
    for where in (first, port):
        status, body = fetch(where)
        assert status == 200
        assert body.startswith("request successfully proxied!\n")
    process.signal(signal.SIGINT)
    assert process.wait_end() == 0, process.log()
    assert refused(first)
    assert refused(port)
    assert "Traceback" not in process.log(), process.log()


# --- prometheus ------------------------------------------------------------------------------------


def page_count(port, metric="hello_requests_total"):
    """What a metrics page says."""
    status, page = fetch(port, "/metrics")
    assert status == 200
    return float(re.search(rf"^{metric} (\S+)$", page, re.M).group(1))


def test_prometheus_counts_for_all_workers(start, port):
    example = Example(start, "prometheus", {9100: port})
    process = example.serve(port)
    assert process.log().count(f"Opened 0.0.0.0:{port} ") == 1
    already = page_count(port)  # waiting for the start has asked, too
    output = example.ask("seq 40")
    *shown, total = example.promises("seq 40")
    assert_shown(shown, output)
    assert total == "hello_requests_total 40.0"
    assert f"hello_requests_total {already + 40}\n" in output
    assert output.count("Hello from worker") == 40
    # the same from whichever worker answers
    assert {page_count(port) for _ in range(20)} == {already + 40}

    for pid in process.workers():
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: process.log().count("Booting worker") == 8, "new workers")
    # a page asked for while prometheus_client makes a worker's file is a 500
    wait_for_sharing(process, port)
    assert page_count(port) == already + 40


def test_prometheus_without_the_directory_counts_for_one_worker(start, port):
    example = Example(start, "prometheus", {9100: port})
    first, server = example.command("gunicorn -k").splitlines()
    assert first.startswith("export PROMETHEUS_MULTIPROC_DIR=")
    example.run(server).wait_ready()
    pids = pids_answering(example.socket, 4)
    assert len(pids) == 4
    seen = set()
    wait_for(lambda: seen.add(page_count(port)) or len(seen) > 1, lambda: f"two workers' counts, seen {seen}")


def test_prometheus_port_from_the_environment(start, port):
    example = Example(start, "prometheus")
    assert "`METRICS_PORT`" in (example.directory / "README.md").read_text()
    example.serve(port, METRICS_PORT=port)
    assert page_count(port) > 0


# --- django ----------------------------------------------------------------------------------------


def test_django_on_gthread(start):
    admin, metrics = free_port(), free_port()
    example = Example(start, "django", {9400: admin, 9401: metrics})
    process = example.serve(admin)
    assert process.log().count("Using worker: gthread") == 1
    for line in example.promises("gunicorn wsgi"):
        assert process.log().count(line) == 1
    already = page_count(metrics, "shop_orders_total")  # waiting for the start has asked, too
    *shown, total = example.promises("seq 20")
    assert total == "shop_orders_total 20.0"
    output = example.ask("seq 20")
    assert_shown(shown, output)
    assert f"shop_orders_total {already + 20}\n" in output
    assert example.ask("/login/").strip().splitlines() == example.promises("/login/")
    process.hup(4)
    # from whichever worker answers, and without a loss by the reload
    assert {page_count(metrics, "shop_orders_total") for _ in range(10)} == {already + 20}
    assert process.stop() == 0, process.log()
    assert not re.search("WARNING|ERROR|Traceback", process.log()), process.log()


# --- fastapi ---------------------------------------------------------------------------------------


def test_fastapi_beside_flask(start):
    admin, metrics = free_port(), free_port()
    example = Example(start, "fastapi", {9500: admin, 9501: metrics})
    process = example.serve(admin, "gunicorn shop")
    for line in example.promises("gunicorn shop"):
        assert process.log().count(line) == 1
    *shown, total = example.promises("seq 20")
    already = page_count(metrics, "shop_orders_total")  # waiting for the start has asked, too
    output = example.ask("seq 20")
    assert_shown(shown, output)
    assert total == "shop_orders_total 20.0"
    assert f"shop_orders_total {already + 20}\n" in output
    assert example.promises(f"curl -s http://localhost:{admin}/")[0] in example.ask(
        f"curl -s http://localhost:{admin}/"
    )
    process.hup(4)
    assert fetch(admin, "/report")[0] == 200
    assert page_count(metrics, "shop_orders_total") == already + 20
    assert process.stop() == 0, process.log()
    assert not re.search("WARNING|ERROR|Traceback", process.log()), process.log()


@pytest.mark.skipif(
    importlib.util.find_spec("gunicorn.asgi") is None, reason="this gunicorn has no worker class asgi"
)
def test_fastapi_on_asgi_workers(start):
    metrics = free_port()
    example = Example(start, "fastapi", {9502: metrics})
    process = example.serve(metrics, "api:api")
    already = page_count(metrics, "api_orders_total")
    *shown, total = example.promises("seq 10")
    output = example.ask("seq 10")
    assert_shown(shown, output)
    assert total == "api_orders_total 10.0"
    assert f"api_orders_total {already + 10}\n" in output
    process.hup(4)
    assert page_count(metrics, "api_orders_total") == already + 10
    assert process.stop() == 0, process.log()
    assert not re.search("WARNING|ERROR|Traceback", process.log()), process.log()


# --- unmodified ------------------------------------------------------------------------------------


def test_unmodified_script(start, port):
    example = Example(start, "unmodified", {5000: port})
    assert "gunicorn_passenger" not in (example.directory / "server.py").read_text()
    process = example.serve()
    output = example.ask("seq 20")
    assert_shown(example.promises("seq 20"), output)
    assert len(output.splitlines()) == 20
    answered = pids_answering(process.socket, 4)
    assert answered == {f"Hello from process {pid}\n" for pid in process.workers()}
    assert refused(port)
    process.wait_log(rf"Running on http://127.0.0.1:{port}")
    assert process.stop() == 0, process.log()
    assert not os.path.exists(process.socket)


def test_unmodified_script_with_plain_python(start, port):
    example = Example(start, "unmodified", {5000: port})
    assert "`python server.py`" in (example.directory / "README.md").read_text()
    process = start.python("server.py", cwd=example.directory, env=example.env).wait_ready(port)
    assert fetch(port)[1] == f"Hello from process {process.pid}\n"
    assert not os.path.exists(example.socket)


# --- hooks -----------------------------------------------------------------------------------------


def hooks_example(start):
    first = free_range(10)
    return Example(start, "hooks", {9100: first, 9109: first + 9, 9200: free_port()}), first


def test_hooks(start):
    example, port = hooks_example(start)
    process = example.serve()
    output = example.ask("seq 8")
    assert_shown(example.promises("seq 8"), output)
    assert output.splitlines()[0] == "Hello"
    assert len(output.splitlines()) == 9
    seen = {}

    def all_seen():
        report = json.loads(fetch(port)[1])
        seen.setdefault(report["worker"], []).append(report["requests"])
        return len(seen) == 4

    wait_for(all_seen, lambda: f"four workers, seen {seen}")
    assert set(seen) == set(process.workers())
    for counts in seen.values():
        assert counts == sorted(set(counts))
    assert process.log().count(f"Opened 127.0.0.1:{port} ") == 1
    process.hup(4)
    assert json.loads(fetch(port)[1])["worker"] in process.workers()
    assert process.stop() == 0, process.log()
    assert refused(port)


def test_hooks_another_port_of_the_allocation(start):
    example, port = hooks_example(start)
    example.serve(port + 5, METRICS_PORT=port + 5)
    assert fetch(port + 5)[0] == 200
    assert refused(port)


def test_hooks_port_outside_the_allocation(start):
    example, _ = hooks_example(start)
    command = example.command("METRICS_PORT=")
    process = example.run(command)
    assert process.wait_end() != 0
    shown, allocation = example.promises("METRICS_PORT=")
    (line,) = [line for line in process.log().splitlines() if "is not allocated" in line]
    assert shown in line
    assert allocation in line
    # no traceback of ours; gunicorn 23 may halt in the midst of a fork, and shows where
    assert "PortNotAllocated" not in process.log(), process.log()


# --- chat ------------------------------------------------------------------------------------------


def test_chat(start):
    """Two pollers, which every request brings to another worker but for the stickiness, and a WebSocket."""
    port, primary = free_port(), free_port()
    example = Example(start, "chat", {9000: port, 9009: port, 8000: primary})
    process = example.run(example.command("gunicorn -k")).wait_ready(primary)
    wait_for_sharing(process, port)
    heard = []
    clients = []
    for transport in ("polling", "polling", "websocket"):
        client = socketio.Client()
        lines = []
        heard.append(lines)
        client.on("line", lines.append)
        client.connect(f"http://127.0.0.1:{primary}", transports=[transport], wait_timeout=60)
        clients.append(client)
    clients[0].emit("enter", "Ada")
    everybody = {"name": "", "text": "Ada is here"}
    wait_for(lambda: all(lines == [everybody] for lines in heard), lambda: heard)
    clients[0].emit("say", "hello")
    said = {"name": "Ada", "text": "hello"}
    wait_for(lambda: all(lines == [everybody, said] for lines in heard), lambda: heard)
    clients[0].disconnect()
    gone = {"name": "", "text": "Ada has left"}
    wait_for(lambda: all(lines == [everybody, said, gone] for lines in heard[1:]), lambda: heard)
    for client in clients[1:]:
        client.disconnect()
    assert fetch(primary)[1].startswith("<!doctype html>")
    wait_for(lambda: only(start)["mailboxes"]["passed"] and only(start)["mailboxes"]["published"])
    assert process.stop() == 0, process.log()
    assert "Traceback" not in process.log(), process.log()


@pytest.mark.parametrize("width", [1000, 400])
def test_chat_in_two_browser_tabs(start, browser, node_modules, width):
    """What one page types, the other one shows; also on a phone, and after both have lost their workers."""
    port, primary = free_port(), free_port()
    example = Example(start, "chat", {9000: port, 9009: port, 8000: primary})
    process = example.run(example.command("gunicorn -k")).wait_ready(primary)
    wait_for_sharing(process, port)
    pages = [browser(), browser()]
    script = (node_modules / "socket.io-client/dist/socket.io.min.js").read_bytes()
    version = json.loads((node_modules / "socket.io-client/package.json").read_text())["version"]
    url = f"http://127.0.0.1:{primary}/"
    for page in pages:
        page.serve(f"https://cdn.socket.io/{version}/socket.io.min.js", script)
        page.open(url, width=width, height=700)
        wait_for(lambda page=page: page.run("socket.connected"), "a session")

    def see(lines):
        for page in pages:
            wait_for(
                lambda page=page: shown(page) == lines, lambda page=page: f"{lines}, shown {shown(page)}"
            )

    ada, grace = pages
    ada.type("#text", "Ada")
    see(said := ["Ada is here"])
    grace.type("#text", "Grace")
    see(said := [*said, "Grace is here"])
    ada.type("#text", "Is anybody here? <b>Hello</b>")
    see(said := [*said, "Ada: Is anybody here? <b>Hello</b>"])
    grace.type("#text", "w" * 400)
    see(said := [*said, f"Grace: {'w' * 400}"])
    for page in pages:
        assert page.run("document.documentElement.scrollWidth") <= width
        inside = "[...document.querySelectorAll('h1, #lines p, input, button')].every(e => {"
        inside += "const r = e.getBoundingClientRect(); return r.left >= 0 && r.right <= innerWidth})"
        assert page.run(inside)
        assert page.run("document.querySelectorAll('b').length") == 0
        assert page.complaints() == []
        hosts = {urlsplit(asked).netloc for asked in page.requests()} - {""}
        assert hosts == {f"127.0.0.1:{primary}", "cdn.socket.io"}
    ada.shot(f"chat-{width}")

    sessions = [page.run("socket.id") for page in pages]
    process.hup(4, primary)
    for page, before in zip(pages, sessions, strict=True):
        wait_for(
            lambda p=page, b=before: p.run("socket.connected && socket.id") not in (False, b), "a session"
        )
    ada.type("#text", "Still here")
    for page in pages:
        wait_for(lambda page=page: shown(page)[-1] == "Ada: Still here", lambda page=page: shown(page))
        assert shown(page).count("Ada: Still here") == 1
    assert process.stop() == 0, process.log()
    assert "Traceback" not in process.log(), process.log()


def shown(page):
    """The lines of the chat that a page shows."""
    return page.run("[...document.querySelectorAll('#lines p')].map(e => e.textContent)")


# --- health ----------------------------------------------------------------------------------------


def test_health_while_all_workers_are_busy(start):
    health = free_port()
    example = Example(start, "health", {9101: health})
    # what blocks a worker ends when the test says so, not after three seconds
    app = example.directory / "app.py"
    text = app.read_text()
    assert "sleep 3" in text
    app.write_text(text.replace("sleep 3", "until [ -e done ]; do sleep 0.1; done"))
    # not example.serve(): the master has a child for its daemons, too
    process = example.run(example.command("gunicorn -b")).wait_ready(example.socket)
    wait_for(lambda: not refused(health) and '"ready": 4' in fetch(health, "/health")[1], process.log)
    line = example.ask("gunicorn-passenger health")
    assert_shown(example.promises("gunicorn-passenger health"), line)

    reports, _, ask, _ = example.command("seq 8").splitlines()
    shown, finished = example.promises("seq 8")
    busy = start.run("bash", "-c", f"{reports}\nwait", env=example.env)
    blocked = re.compile(r"until \[ -e done")

    def all_blocked():
        commands = [Path(f"/proc/{pid}/cmdline") for pid in process.session()]
        return sum(bool(blocked.search(path.read_text())) for path in commands if path.exists()) == 4

    wait_for(all_blocked, process.log)
    assert_shown([shown], example.shell(ask))
    assert "Hello" not in busy.log()
    (example.directory / "done").touch()
    assert busy.wait_end() == 0
    assert_shown([finished], busy.log())
    assert process.stop() == 0, process.log()


# --- jobs ------------------------------------------------------------------------------------------


def test_jobs(start):
    require("redis-server")
    example = Example(start, "jobs", {9001: free_port()})
    process = example.run(example.command("gunicorn -b")).wait_ready(example.socket)
    for line in example.promises("gunicorn -b"):
        process.wait_log(re.sub(r"\d+", r"\\d+", line))
    process.wait_log(r"\[redis\] .*Ready to accept connections")
    post, get = example.command("curl -s -X POST").splitlines()
    accepted, done = example.promises("curl -s -X POST")
    assert example.shell(post).strip() == accepted
    wait_for(lambda: example.shell(get).strip() == done, process.log)
    assert process.log().count("[jobs] works on mail-to-ada") == 1
    assert process.stop() == 0, process.log()
    log = process.log()
    assert 0 < log.index("[jobs] has no job in hand, and exits") < log.index("Redis is now ready to exit"), (
        log
    )
    # Redis has warnings of its own about the machine
    log = re.sub(r".*\[redis\].*", "", log)
    assert not re.search("WARNING|Warning|ERROR|Traceback", log), log


# --- docker ----------------------------------------------------------------------------------------


def test_docker(start, port):
    """The program outside its container. scripts/container-test builds and runs the image."""
    example = Example(start, "docker", {9000: port})
    ports = re.search(r"^ENV (PASSENGER_PORTS)=(\d+)$", (example.directory / "Dockerfile").read_text(), re.M)
    command = f"gunicorn -k gunicorn_passenger.Worker --umask 007 -b unix:{example.socket} app"
    process = example.run(command, **{ports[1]: ports[2]}).wait_ready()
    shown, _ = example.promises("docker exec")
    assert fetch(port) == (200, f"{shown}\n")
    assert process.log().count(f"Opened 0.0.0.0:{port} ") == 1
    assert process.stop() == 0, process.log()
    assert not re.search("WARNING|ERROR|Traceback", process.log()), process.log()


# --- events ----------------------------------------------------------------------------------------


def test_events(start):
    """Four streams and four WebSockets, of whichever workers, hear what one request says; so does the next worker."""
    primary = free_port()
    example = Example(start, "events", {8000: primary})
    process = example.run(example.command("gunicorn -k")).wait_ready(primary)
    wait_for(lambda: len(process.workers()) == 4, "four workers")
    (promised,) = example.promises("curl -d")
    streams = [
        subprocess.Popen(
            ["bash", "-ec", f"exec {example.command('curl -sN')}"], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    sockets = [websocket.create_connection(f"ws://127.0.0.1:{primary}/socket", timeout=60) for _ in range(4)]
    try:
        for client in (*streams, *sockets):
            # a client that is not connected yet does not hear it: say it again
            receive = client.stdout.readline if client in streams else client.recv
            with ThreadPoolExecutor(1) as pool:
                heard = pool.submit(
                    lambda receive=receive: next(line for line in iter(receive, None) if line.strip())
                )
                wait_for(lambda heard=heard: example.ask("curl -d") == "" and heard.done())
            assert heard.result().strip() == (
                promised if client in streams else promised.removeprefix("data: ")
            )
    finally:
        for client in streams:
            client.kill()
            client.wait()
            client.stdout.close()
        for client in sockets:
            client.close()
    assert process.stop() == 0, process.log()
    assert "Traceback" not in process.log(), process.log()
