"""The log of a master that gevent has patched, whose threads are the system's."""

import subprocess
import sys

PATCHED = """
from gevent import monkey
monkey.patch_all()
import _thread, logging
from types import SimpleNamespace
from gunicorn_passenger.system import log_locks, unpatched

handler = logging.StreamHandler()
log = logging.getLogger("gunicorn.error")
log.addHandler(handler)
log_locks.share_between_threads(SimpleNamespace(error_log=log, access_log=log))
assert type(handler.lock) is _thread.RLock
held, waits = unpatched.lock(), unpatched.lock()
held.acquire()
waits.acquire()

def log_beside():
    with handler.lock:
        held.release()
        waits.acquire(timeout=0.2)  # until the other thread waits for the handler

unpatched.start_thread(log_beside)
held.acquire()
log.error("from the arbiter")
log_locks.leave_to_greenlets()
assert type(handler.lock) is not _thread.RLock, handler.lock
"""


def test_two_threads_of_a_patched_master_log_at_a_time():
    done = subprocess.run(
        [sys.executable, "-c", PATCHED], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "from the arbiter\n")
