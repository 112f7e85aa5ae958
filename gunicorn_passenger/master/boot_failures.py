"""Workers that cannot boot: what `status` says of them, and when gunicorn may try again.

Process: the master, in the broker's thread and the arbiter's. Never: start or stop a worker.

While other workers serve, a worker that cannot boot does not halt gunicorn. The arbiter starts another one
after a pause, which grows with each attempt. The workers that one attempt starts fail together, so failures
during the pause belong to the attempt before it.
"""

from __future__ import annotations

from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.master.event_log import EventLog

#: Seconds before the second attempt; each further pause is twice as long, up to the limit.
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0
#: How many different failures are logged, each once: a worker can invent as many as it likes.
_MAX_TEXTS = 64


class BootFailures:
    """The attempts since the last success or reload."""

    def __init__(self) -> None:
        #: why new workers cannot start, for people; empty when they can
        self.text = ""
        #: when the next attempt is due (monotonic seconds); 0 when none is pending
        self.retry_at = 0.0
        #: whether a worker's exit makes gunicorn halt
        self.halting = False
        self._is_reload = False
        #: whether the last reload failed before it started any worker
        self._rejected = False
        self._pause = 0.0
        self._logged: set[str] = set()

    @property
    def retrying(self) -> bool:
        """Whether the last attempt has failed, and another one follows."""
        return self._pause > 0

    def is_new(self, text: str) -> bool:
        """Whether a failure has not been logged since the last reload."""
        if text in self._logged or len(self._logged) >= _MAX_TEXTS:
            return False
        self._logged.add(text)
        return True

    def record(self, text: str, is_reload: bool, now: float) -> bool:
        """A worker cannot boot.

        :param is_reload: whether workers with the previous program serve.
        :param now: monotonic seconds.
        :returns: whether it is the first failure of an attempt.
        """
        if now < self.retry_at:
            return False
        self._is_reload = is_reload
        self.text = f"reload failed: {text}" if is_reload else f"new workers cannot start: {text}"
        self._pause = min(max(2 * self._pause, _FIRST_PAUSE), _LONGEST_PAUSE)
        self.retry_at = now + self._pause
        return True

    def report(self, log: Log, event_log: EventLog) -> None:
        """Log the failure that was recorded last."""
        event_log.record("boot_failure", self.text)
        which = "with the previous program" if self._is_reload else "that run"
        log.error(
            "gunicorn-passenger: %s. The workers %s continue to serve. Repair the program and reload "
            "gunicorn (HUP); otherwise the master tries again in %g s",
            self.text,
            which,
            self._pause,
        )

    def reload_rejected(self, text: str) -> None:
        """gunicorn could not read its configuration: there is nothing to try again before the next reload."""
        self.forget()
        self.text = f"reload failed: {text}"
        self._rejected = True

    def retry_now(self) -> None:
        """The program may have been repaired: the next attempt need not wait."""
        self._pause = self.retry_at = 0.0

    def on_worker_ready(self) -> None:
        """A worker with the newest program serves."""
        if not self._rejected:
            self.text = ""
        self.retry_now()

    def forget(self) -> None:
        """A reload starts over."""
        self.text = ""
        self._rejected = False
        # the worker whose exit was to halt gunicorn may have been stopped
        self.halting = False
        self._logged.clear()
        self.retry_now()
