"""README.md, and docs/tutorial.md from its first step to its last, with one gunicorn and one nginx.

As in the examples' tests, only the paths below /tmp, the port numbers and the number of workers are others.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from conditions import PATIENCE, wait_for
from example_sites import BIN, assert_shown
from free_ports import free_port
from http_client import answers, refused
from processes import ROOT, require


class Page:
    """The blocks of a page, in their order, with the addresses of the test."""

    def __init__(self, home, page):
        text = (ROOT / page).read_text()
        self.home = home
        self.ports = {name: free_port() for name in ("9000", "8080")}
        replaced = self.ports | {
            "/tmp/shop.sock": f"{home}/app.sock",
            "/tmp/app.sock": f"{home}/app.sock",
            "/tmp/shop": f"{home}/shop",
            "-w 4": "-w 2",
        }
        for old, new in replaced.items():
            text = text.replace(old, str(new))
        self.blocks = iter(re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S))
        self.env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}:/usr/sbin"}

    def next(self, language, containing):
        """The next block, which has to be this one."""
        found, text = next(self.blocks)
        assert found == language
        assert containing in text
        return text

    def ask(self, containing, **env):
        """Run the next block of commands; its output."""
        done = subprocess.run(
            ["bash", "-ec", self.next("sh", containing)],
            cwd=self.home, env=self.env | env, capture_output=True, text=True, timeout=PATIENCE, check=True,
        )  # fmt: skip
        return done.stdout


def test_readme(start):
    """The program of the README, started as it says, gives what it says."""
    page = Page(start.home, "README.md")
    start.write("app.py", page.next("python", "listen("))
    install, command = page.next("sh", "gunicorn -k").splitlines()
    assert install.startswith("pip install")
    process = start.run(
        "bash", "-c", f"exec {command}", env={"PATH": page.env["PATH"], "PYTHONPATH": ""}
    ).wait_ready()
    wait_for(lambda: len(process.workers()) == 2 and answers(page.ports["9000"]), process.log)
    assert page.ask("--unix-socket") == "request successfully proxied!\n" * 2
    assert process.stop() == 0, process.log()


def test_tutorial(start):
    require("nginx")
    page = Page(start.home, "docs/tutorial.md")
    page.next("sh", "pip install")
    app = start.write("app.py", page.next("python", "listen("))
    command = page.next("sh", "gunicorn -k")
    process = start.run(
        "bash", "-c", f"exec {command}", env={"PATH": page.env["PATH"], "PYTHONPATH": ""}
    ).wait_ready()
    wait_for(lambda: len(process.workers()) == 2 and answers(page.ports["9000"]), process.log)
    output = page.ask("--unix-socket")
    assert_shown(page.next("text", "Hello").splitlines(), output)
    assert process.log().count(f"Opened 127.0.0.1:{page.ports['9000']} for the workers") == 1

    user = "user root;\n" if os.geteuid() == 0 else ""
    start.write("nginx.conf", user + page.next("nginx", "upstream shop"))
    start.run("bash", "-c", f"exec {page.next('sh', 'nginx -p')}", env={"PATH": page.env["PATH"]})
    wait_for(lambda: not refused(page.ports["8080"]), "nginx")
    output = page.ask("/numbers/")
    assert_shown(page.next("text", "Hello").splitlines(), output)

    app.open("a").write(page.next("python", "flask_sock"))
    before = set(process.workers())
    hup = page.next("sh", "kill -HUP")

    def reload():
        subprocess.run(["bash", "-ec", hup], check=True)

    reload()
    wait_for(lambda: len(process.workers()) == 2 and not before & set(process.workers()), process.log)
    client = page.next("python", "websocket")
    done = subprocess.run([sys.executable, "-c", client], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "HELLO\n", done.stderr

    start.write("jobs.py", page.next("python", "def work"))
    start.write("gunicorn.conf.py", page.next("python", "spawn("))
    reload()
    process.wait_log("Daemon jobs runs as pid")
    process.wait_log("looking for jobs in mail")
    shown = page.ask(
        "gunicorn-passenger status", PASSENGER_RUNTIME_DIR=start.environment["PASSENGER_RUNTIME_DIR"]
    )
    assert re.search(rf"127\.0\.0\.1:{page.ports['9000']}", shown)
    assert re.search(r"^jobs +\d+ +running", shown, re.MULTILINE), shown
    assert process.stop() == 0, process.log()
    assert not Path(process.socket).exists()
