"""The programs and packages that a benchmark needs."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import ROOT, Failed
from .processes import Command
from .tables import progress

#: The variable of setup.py.
COMPILE = "GUNICORN_PASSENGER_COMPILE"


def require_programs(wanted: Mapping[str, str], hint: str = "") -> None:
    """Say at once which programs are missing, and which packages of the distribution have them."""
    missing = [program for program in wanted if shutil.which(program) is None]
    if missing:
        packages = " ".join(wanted[program] for program in missing)
        raise Failed(f"there is no {', no '.join(missing)} here: apt-get install {packages}{hint}")


def installation_error(command: Command, cwd: Path | None = None) -> str:
    """Run an installer; what it had to say if it failed, else nothing."""
    run = subprocess.run(
        [str(word) for word in command], cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if run.returncode == 0:
        return ""
    lines = [line.strip() for line in run.stdout.splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line.lower()]
    return (telling or lines or [f"{command[0]} failed"])[0]


def pip(venv: Path, *words: object) -> Command:
    return [venv / "bin" / "python", "-m", "pip", "--disable-pip-version-check", *words]


def make_environment(venv: Path) -> None:
    """Make the virtual environment that the benchmarks share.

    What this project needs is installed again when setup.cfg has changed, or an old environment would
    measure it without. With GUNICORN_PASSENGER_COMPILE=1 the project is compiled, and installed as a wheel.
    """
    if not (venv / "bin" / "python").exists():
        progress(f"making {venv}")
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    stamp = venv / "installed"
    if not stamp.exists() or stamp.stat().st_mtime < (ROOT / "setup.cfg").stat().st_mtime:
        progress("installing gunicorn, gevent, Flask and this project")
        packages = ["gunicorn", "gevent", "Flask", "--editable", f"{ROOT}[fast]"]
        if why := installation_error(pip(venv, "install", "--quiet", *packages)):
            raise Failed(f"pip install: {why}")
        stamp.touch()
    if os.environ.get(COMPILE):
        install_compiled(venv)
        return
    # as an installation does it: compiled at each start, it would take more memory than it has
    compiling = [venv / "bin" / "python", "-m", "compileall", "-q", ROOT / "gunicorn_passenger"]
    subprocess.run(compiling, check=True)


def install_compiled(venv: Path) -> None:
    """Build the compiled wheel of this working tree, and install it in place of the working tree itself."""
    progress("compiling this project")
    with tempfile.TemporaryDirectory() as directory:
        build = [ROOT / "scripts" / "compiled-wheel", venv / "bin" / "python", directory]
        if why := installation_error(build):
            raise Failed(f"scripts/compiled-wheel: {why}")
        (wheel,) = Path(directory).glob("*.whl")
        again = ("--quiet", "--force-reinstall", "--no-deps")
        if why := installation_error(pip(venv, "install", *again, wheel)):
            raise Failed(f"pip install: {why}")
    # the next benchmark without the variable measures the working tree again
    (venv / "installed").unlink()


def installed_versions(venv: Path) -> dict[str, str]:
    run = subprocess.run(pip(venv, "list", "--format", "json"), capture_output=True, text=True, check=True)
    return {package["name"].lower(): package["version"] for package in json.loads(run.stdout)}


def program_version(*command: str) -> str:
    """The last word of what a program says of its version: "nginx version: nginx/1.2" is 1.2."""
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return run.stdout.split()[-1].rpartition("/")[2].lstrip("v")


def versions_of(venv: Path, packages: Sequence[str], programs: Mapping[str, str]) -> dict[str, str]:
    """What is measured and what measures.

    :param programs: each with its option for that; those that are not here are left out.
    """
    installed = installed_versions(venv)
    found = {name: installed[name] for name in packages if name in installed}
    found["python"] = program_version(str(venv / "bin/python"), "-V")
    if os.environ.get(COMPILE):
        found["gunicorn-passenger"] = "compiled"
    for program, option in programs.items():
        if shutil.which(program):
            found[program] = program_version(program, option)
    return found
