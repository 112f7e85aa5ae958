"""What the master says of a deployment's mistakes before gunicorn opens its sockets."""

import logging
import os
import re
import socket

import pytest
from gunicorn.config import Config
from gunicorn.errors import AppImportError

from gunicorn_passenger.arbiter import deployment_checks, program_import
from gunicorn_passenger.errors import SettingError


@pytest.fixture
def said(caplog, monkeypatch):
    """Check a configuration; the one line that is logged, or an empty string."""
    monkeypatch.setattr(deployment_checks, "_checked", {"shell"})

    def check(**settings):
        cfg = Config()
        for name, value in settings.items():
            cfg.set(name, value)
        caplog.clear()
        deployment_checks.check(cfg, logging.getLogger())
        assert len(caplog.records) <= 1
        return caplog.text

    return check


def test_a_deployment_without_mistakes(said, tmp_path):
    assert said(bind=[f"unix:{tmp_path}/app.sock", "127.0.0.1:8000"], worker_tmp_dir=str(tmp_path)) == ""


def test_no_directory_for_the_socket(said, tmp_path):
    assert re.search(
        f"ERROR .*cannot open the socket {tmp_path}/none/app.sock: the directory {tmp_path}/none does not exist; use systemd's",
        said(bind=f"unix:{tmp_path}/none/app.sock"),
    )


def test_a_directory_that_is_not_writable(said, tmp_path, monkeypatch):
    # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(tmp_path))
    assert re.search(
        rf"ERROR .*: \S+ cannot write to {tmp_path}; .*install -d", said(bind=f"unix:{tmp_path}/a")
    )


def test_a_path_that_is_not_a_socket(said, tmp_path):
    (tmp_path / "app.sock").touch()
    assert re.search(
        "ERROR .*exists and is not a socket; remove the file", said(bind=f"unix:{tmp_path}/app.sock")
    )


def test_a_socket_that_a_process_serves(said, tmp_path, monkeypatch):
    path = f"{tmp_path}/app.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        # no process serves it yet, and gunicorn replaces it
        assert said(bind=f"unix:{path}") == ""
        listener.listen()
        # in a reload, the process is gunicorn itself
        assert said(bind=f"unix:{path}") == ""
        monkeypatch.setattr(deployment_checks, "_checked", {"shell"})
        line = said(bind=f"unix:{path}")
        assert re.search(rf"WARNING .*Another process \(pid {os.getpid()}\) serves the socket {path}\.", line)
        # systemd, or the previous master, passes the socket on
        monkeypatch.setattr(deployment_checks, "_checked", {"shell"})
        monkeypatch.setenv("LISTEN_FDS", "1")
        assert said(bind=f"unix:{path}") == ""


def test_no_directory_for_heartbeats(said, tmp_path):
    with pytest.raises(SettingError, match=f"{tmp_path}/shm of --worker-tmp-dir does not exist; mount it"):
        said(worker_tmp_dir=f"{tmp_path}/shm")


def test_a_shell_as_process_1(said, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(deployment_checks, "_checked", set())
    comm = tmp_path / "comm"
    monkeypatch.setattr(deployment_checks, "_COMM", comm)
    comm.write_text("bash\n")
    assert re.search("WARNING .*Process 1 is bash, .*Start gunicorn with exec", said())
    assert said() == ""
    monkeypatch.setattr(deployment_checks, "_checked", set())
    comm.write_text("systemd\n")
    assert said() == ""


@pytest.mark.parametrize("uri", ["no_such_module", "no_such_module:app", "no_such_module.wsgi:app"])
def test_a_wrong_module_name(uri):
    with pytest.raises(AppImportError, match=r"The module 'no_such_module' was not found in .*--chdir"):
        program_import.import_app(uri)


def test_a_module_that_the_program_misses(tmp_path, monkeypatch):
    """That is an error of the program, whose traceback says more."""
    (tmp_path / "broken_program.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError):
        program_import.import_app("broken_program")
