"""A copy of one of the examples, with ports of its own, and the commands of its README."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conditions import PATIENCE, wait_for
from processes import ROOT, descriptors

EXAMPLES = ROOT / "examples"

#: Where the commands that belong to the Python of the tests are.
BIN = Path(sys.executable).parent


def need(condition, what):
    """Skip a test that cannot run here; in CI everything has to be there."""
    if not condition:
        assert not os.environ.get("CI"), f"{what} is missing"
        pytest.skip(f"needs {what}")


class Example:
    """A copy of an example, in which its port numbers are replaced."""

    def __init__(self, start, name, ports=()):
        for program in ("bash", "curl"):
            need(shutil.which(program), program)
        for command in ("gunicorn", "gunicorn-passenger"):
            need((BIN / command).exists(), f"the command {command} beside {sys.executable}")
        for module in re.findall(r"^pip install (.+)$", (EXAMPLES / name / "README.md").read_text(), re.M):
            for package in module.split():
                need(importlib.util.find_spec(package), package)
        self.start = start
        self.socket = f"{start.home}/app.sock"
        self.directory = start.home / name
        self.replaced = {rf"(?<!\d){number}(?!\d)": str(port) for number, port in dict(ports).items()} | {
            r"/tmp/\w+\.sock": self.socket
        }
        shutil.copytree(EXAMPLES / name, self.directory, ignore=shutil.ignore_patterns("__pycache__"))
        for path in self.directory.iterdir():
            path.write_text(self.replace(path.read_text()))
        # each block of code: its language and its text
        self.blocks = re.findall(
            r"^```(\w+)\n(.*?)^```$", (self.directory / "README.md").read_text(), re.M | re.S
        )
        self.env = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "TMPDIR": str(start.home),
            # an example finds its own modules, and no others
            "PYTHONPATH": "",
        }

    def replace(self, text):
        for pattern, replacement in self.replaced.items():
            text = re.sub(pattern, replacement, text)
        return text

    def command(self, containing):
        """The one block of commands that contains a string."""
        found = [text for language, text in self.blocks if language == "sh" and containing in text]
        assert len(found) == 1, f"{len(found)} blocks with {containing!r}"
        return found[0]

    def run(self, command, **env):
        """Start a block of commands, of which the last is the server."""
        *before, server = command.splitlines()
        # the server takes the shell's place, so that signals reach it
        script = "\n".join(["set -e", *before, re.sub(r"^(\w+=\S+ )*", r"\g<0>exec ", server)])
        return self.start.run("bash", "-c", script, cwd=self.directory, env=self.env | env)

    def serve(self, port=None, containing="", **env):
        """Start what the README says, and wait for it, and for the port in all of its workers.

        :param containing: tells its block of commands from others that start gunicorn.
        """
        (server,) = {
            text for language, text in self.blocks
            if language == "sh" and containing in text and re.search(r"^gunicorn", text, re.M)
        }  # fmt: skip
        process = self.run(server, **env).wait_ready(self.socket)
        wait_for(lambda: len(process.workers()) == 4, "four workers")
        if port is not None:
            wait_for_sharing(process, port)
        return process

    def ask(self, containing):
        """Run a block of commands that ends by itself; its output."""
        return self.shell(self.command(containing))

    def shell(self, commands):
        done = subprocess.run(
            ["bash", "-ec", commands],
            cwd=self.directory, env={**self.start.environment, **self.env},
            capture_output=True, text=True, timeout=PATIENCE, check=True,
        )  # fmt: skip
        return done.stdout

    def promises(self, containing):
        """The lines of the output that the README shows after the block of commands that has a string."""
        at = self.blocks.index(("sh", self.command(containing)))
        language, text = self.blocks[at + 1]
        assert language == "text"
        return text.splitlines()


def wait_for_sharing(process, port):
    """Wait until four workers have the one listening socket of a port."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines():
        fields = line.split()
        if fields[3] == "0A" and fields[1].endswith(f":{port:04X}"):  # TCP_LISTEN
            inodes.add(fields[9])
    (inode,) = inodes

    def sharing():
        return [pid for pid in process.workers() if f"socket:[{inode}]" in descriptors(pid)]

    wait_for(lambda: len(sharing()) == 4, lambda: f"four workers to share port {port}:\n{process.log()}")


def assert_shown(lines, output):
    """Every line is in the output, numbers aside."""
    for line in lines:
        pattern = re.sub(r"\d+", r"\\d+", re.escape(line))
        assert re.search(pattern, output), f"no {line!r} in:\n{output}"
