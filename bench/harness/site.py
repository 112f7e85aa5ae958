"""Where servers run: their directories, programs, cores and environment."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from . import Failed

SOURCE = Path(__file__).with_name("traffic.c")


@dataclass(frozen=True)
class Site:
    """A directory in which a server runs, the programs of a virtual environment and the pair of cores."""

    home: Path
    bin: Path
    core: int
    load_core: int
    #: the compiled traffic.c
    traffic: Path
    #: the TCP port of 127.0.0.1 that the server listens on; 0 for its UNIX socket
    port: int = 0

    @property
    def socket(self) -> Path:
        return self.home / "s"

    @property
    def target(self) -> int | Path:
        """Where the server listens, as traffic.c takes it."""
        return self.port or self.socket

    @property
    def log(self) -> Path:
        return self.home / "log"


def temporary_directory(parent: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """A new directory, whose name is short enough for the paths of UNIX sockets."""
    return tempfile.TemporaryDirectory(prefix="bench-", dir=parent, ignore_cleanup_errors=True)


@contextlib.contextmanager
def first_site(venv: Path) -> Iterator[Site]:
    """The site below which those of all runs are made."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise Failed("two cores are needed: one for the server, one for the load")
    with temporary_directory() as name:
        home = Path(name)
        subprocess.run(["cc", "-O2", "-o", home / "traffic", SOURCE], check=True)
        yield Site(home, venv / "bin", *cores[:2], home / "traffic")


@contextlib.contextmanager
def new_site(first: Site, port: int = 0) -> Iterator[Site]:
    with temporary_directory(first.home) as home:
        yield replace(first, home=Path(home), port=port)


def clean_environment(home: Path, **more: object) -> dict[str, str]:
    """This process's environment without anything that would change a contestant, and with ``more``."""
    foreign = ("PASSENGER_", "GUNICORN_", "NODE_", "NGINX", "BENCH")
    others = ("XDG_RUNTIME_DIR", "PORT", "WEB_CONCURRENCY", "PYTHONDONTWRITEBYTECODE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign) and k not in others}
    more = {"HOME": home, "PASSENGER_RUNTIME_DIR": home / "run", **more}
    return kept | {name: str(value) for name, value in more.items()}
