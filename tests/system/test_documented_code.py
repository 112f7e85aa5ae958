"""The code on the pages of the documentation runs, or at least is valid."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import yaml
from gunicorn.config import Config
from processes import PROGRAMS, ROOT, require

from gunicorn_passenger import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCS = ROOT / "docs"


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_plots_show_the_tables():
    subprocess.run([sys.executable, ROOT / "scripts" / "draw_performance.py", "--check"], check=True)


def blocks(*languages: str) -> Iterator[tuple[str, str]]:
    """The blocks of some languages: where each is, and its text, with the files that it includes."""
    for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]:
        text = path.read_text()
        for match in re.finditer(r"^ *```(\w+)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
            if match[1] in languages:
                where = f"{ids(path)}:{text.count(chr(10), 0, match.start()) + 1}"
                include = re.fullmatch(r'--8<-- "(.+)"\n', match[2])
                yield where, (ROOT / include[1]).read_text() if include else textwrap.dedent(match[2])


def test_every_block_is_checked():
    checked = {"python", "sh", "js", "toml", "yaml", "text"}
    elsewhere = {
        "nginx",
        "ini",
        "dockerfile",
    }  # tests/deploy, tests/system/test_tutorial.py, scripts/container-test
    languages = {
        language
        for path in [ROOT / "README.md", *DOCS.rglob("*.md")]
        for language in re.findall(r"^ *```(.+)\n", path.read_text(), re.MULTILINE)
    }
    assert languages <= checked | elsewhere


def test_python():
    """Each block runs, as a program that a master preloads; the tutorial's client needs the tutorial's servers."""
    found = [[where, code] for where, code in blocks("python") if "import websocket\n" not in code]
    done = subprocess.run(
        [sys.executable, PROGRAMS / "documented_code.py"],
        input=json.dumps(found), capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == {}


def test_shell():
    """The syntax of each block, and the options of gunicorn and of our own command."""
    parser = Config().parser()
    for where, text in blocks("sh"):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"\w+=", words[0]):
                del words[0]
            if words[:1] == ["gunicorn"]:
                parser.parse_args(words[1:])
            elif words[:1] == ["gunicorn-passenger"]:
                assert re.search(rf"\b{words[1]}\b", cli._USAGE), where


def test_toml_and_yaml():
    for where, text in blocks("toml"):
        assert tomllib.loads(text), where
    for where, text in blocks("yaml"):
        assert yaml.safe_load(text), where
    for file in [ROOT / ".pre-commit-config.yaml", *(ROOT / ".github").rglob("*.yml")]:
        assert yaml.safe_load(file.read_text()), file


def test_javascript(tmp_path):
    for where, text in blocks("js"):
        file = tmp_path / "block.js"
        file.write_text(text)
        done = subprocess.run([require("node"), "--check", file], capture_output=True, text=True)
        assert done.returncode == 0, (where, done.stderr)
