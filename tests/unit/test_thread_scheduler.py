"""The thread in which a worker of another class acts on the master's messages."""

import errno
import importlib
import logging
import sys
import threading
from types import ModuleType

import pytest
from conditions import PATIENCE

from gunicorn_passenger.serving import scheduler
from gunicorn_passenger.serving.scheduler import ThreadScheduler
from gunicorn_passenger.system.import_watch import imported


@pytest.fixture
def threads():
    """A scheduler; its thread has ended afterwards."""
    made = ThreadScheduler(logging.getLogger("test"), lambda: None, lambda: pytest.fail("no hub is needed"))
    yield made
    ended = threading.Event()

    def end():
        ended.set()
        raise SystemExit

    made.spawn(end)
    assert ended.wait(PATIENCE)


def test_a_signal_handler_may_spawn_while_the_thread_starts(threads, monkeypatch):
    """SIGTERM may come while the program's thread, which is the main one, asks for its first port."""
    done, start, begun = threading.Event(), scheduler.unpatched.start_thread, []

    def interrupted(function):
        begun.append(True)
        threads.spawn(done.set)  # as the signal handler does, in the same thread
        start(function)

    monkeypatch.setattr(scheduler.unpatched, "start_thread", interrupted)
    asking = threading.Thread(target=threads.spawn, args=[lambda: None], daemon=True)
    asking.start()
    asking.join(PATIENCE)
    assert not asking.is_alive()
    assert done.wait(PATIENCE)
    assert len(begun) == 1


def test_a_function_begins_at_once_however_the_threads_take_turns(threads):
    """In Python 3.10 ``SimpleQueue.get(timeout=0.0)`` may wait for the next item."""
    stop, interval = threading.Event(), sys.getswitchinterval()

    def busy():
        while not stop.is_set():
            pass

    others = [threading.Thread(target=busy, daemon=True) for _ in range(3)]
    sys.setswitchinterval(1e-6)
    try:
        for other in others:
            other.start()
        for _ in range(2000):
            begun = threading.Event()
            threads.spawn(begun.set)
            assert begun.wait(PATIENCE)
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        for other in others:
            other.join(PATIENCE)


def test_a_hub_that_cannot_be_made_is_an_error_where_it_is_needed(threads, monkeypatch):
    """The worker may have no descriptor for it; the program's thread must not wait for ever."""

    def no_descriptor():
        raise OSError(errno.EMFILE, "no descriptor")

    monkeypatch.setattr(threads, "_new_hub", no_descriptor)
    raised = []

    def ask():
        with pytest.raises(OSError, match="no descriptor") as caught:
            threads.run_in_hub(lambda: None)
        raised.append(caught.value)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    assert len(raised) == 1


def test_a_thread_that_the_system_refuses_is_started_later(threads, monkeypatch):
    """The limit of processes may be reached for a moment."""

    def refused(_function):
        raise RuntimeError("can't start new thread")

    ran = threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr(scheduler.unpatched, "start_thread", refused)
        with pytest.raises(RuntimeError):
            threads.spawn(ran.set)
    threads.spawn(lambda: None)
    assert ran.wait(PATIENCE)


def test_a_debugger_sees_the_threads_below_those_of_python():
    """``threading.settrace`` is for all threads; coverage.py uses it, too."""
    seen, done = [], threading.Event()

    def trace(frame, _event, _argument):
        seen.append(frame.f_code.co_name)

    def work_of_the_thread():
        done.set()

    before = threading.gettrace()
    threading.settrace(trace)
    try:
        scheduler.unpatched.start_thread(work_of_the_thread)
    finally:
        threading.settrace(before)
    assert done.wait(PATIENCE)
    assert "work_of_the_thread" in seen


def test_a_module_that_another_thread_is_importing_does_not_count(tmp_path, monkeypatch):
    """A signal handler may come while the thread of the servers imports gevent."""
    (tmp_path / "imported_slowly.py").write_text("import import_gate\nimport_gate.wait()\nready = True\n")
    gate = ModuleType("import_gate")
    begun, go = threading.Event(), threading.Event()
    gate.wait = lambda: (begun.set(), go.wait(PATIENCE))
    monkeypatch.setitem(sys.modules, "import_gate", gate)
    monkeypatch.syspath_prepend(tmp_path)
    assert imported("imported_slowly") is None
    importing = threading.Thread(target=importlib.import_module, args=["imported_slowly"])
    importing.start()
    try:
        assert begun.wait(PATIENCE)
        assert "imported_slowly" in sys.modules
        assert imported("imported_slowly") is None
    finally:
        go.set()
        importing.join()
    assert imported("imported_slowly").ready
    del sys.modules["imported_slowly"]
