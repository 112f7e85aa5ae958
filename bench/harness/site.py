"""Where servers run: their directories, programs, cores and environment."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import Failed


@dataclass(frozen=True)
class Kit:
    """What all runs share: the programs of a virtual environment, a directory and the pair of cores."""

    bin: Path
    home: Path
    core: int
    load_core: int

    @property
    def cores(self) -> tuple[int, int]:
        return self.core, self.load_core

    @property
    def traffic(self) -> Path:
        """The compiled traffic.c."""
        return self.home / "traffic"


@dataclass(frozen=True)
class Site:
    """Where one server runs: its own new directory."""

    kit: Kit
    home: Path

    @property
    def socket(self) -> Path:
        return self.home / "s"

    @property
    def log(self) -> Path:
        return self.home / "log"


def temporary_directory(parent: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """A new directory, whose name is short enough for the paths of UNIX sockets."""
    return tempfile.TemporaryDirectory(prefix="bench-", dir=parent, ignore_cleanup_errors=True)


@contextlib.contextmanager
def kit_of(venv: Path) -> Iterator[Kit]:
    """The first core is the server's, the second the load's."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise Failed("two cores are needed: one for the server, one for the load")
    with temporary_directory() as home:
        yield Kit(venv / "bin", Path(home), *cores[:2])


@contextlib.contextmanager
def new_site(kit: Kit) -> Iterator[Site]:
    with temporary_directory(kit.home) as home:
        yield Site(kit, Path(home))


def clean_environment(home: Path, **more: object) -> dict[str, str]:
    """This process's environment without anything that would change a contestant, and with ``more``."""
    foreign = ("PASSENGER_", "GUNICORN_", "NODE_", "NGINX", "BENCH")
    others = ("XDG_RUNTIME_DIR", "PORT", "WEB_CONCURRENCY", "PYTHONDONTWRITEBYTECODE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign) and k not in others}
    more = {"HOME": home, "PASSENGER_RUNTIME_DIR": home / "run", **more}
    return kept | {name: str(value) for name, value in more.items()}
