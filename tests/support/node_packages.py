"""The packages of npm that tests use."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from pathlib import Path

import pytest
from peer_servers import NODE
from processes import require


def installed() -> Path:
    """The packages of tests/node/package-lock.json, installed once for all test processes."""
    require("node")
    npm = require("npm")
    lock = (NODE / "package-lock.json").read_bytes()
    wanted = hashlib.sha256(lock).hexdigest()
    mark = NODE / "node_modules" / ".installed"
    with (NODE / "package-lock.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not mark.exists() or mark.read_text() != wanted:
            done = subprocess.run(
                [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"],
                cwd=NODE,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                assert "CI" not in os.environ, done.stderr
                pytest.skip(f"npm installs nothing here: {done.stderr[-300:]}")
            mark.write_text(wanted)
    return NODE / "node_modules"
