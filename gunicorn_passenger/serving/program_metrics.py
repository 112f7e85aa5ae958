"""The program's own metrics, which it counts with ``prometheus_client``, summed over all workers.

Process: a worker, the status daemon. Never: import ``prometheus_client`` where the setting is off, or before
the program: it may have gevent patch the process first.

The master sets up the directory in which the workers count (``status/prometheus_multiproc.py``).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

from gunicorn_passenger.system.callers import called_in_packages
from gunicorn_passenger.system.import_watch import call_when_imported
from gunicorn_passenger.system.text import printable

#: Where ``prometheus_client`` counts in its multiprocess mode.
VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
#: Packages whose servers show the default registry of ``prometheus_client``.
_EXPORTERS = ("prometheus_client", "django_prometheus", "prometheus_flask_exporter")


def sum_metrics() -> list[Any]:
    """The metrics of all processes that count in the directory. A failure is logged, and gives none."""
    for last in (False, True):
        try:
            from prometheus_client import multiprocess

            with os.scandir(os.environ[VARIABLE]) as entries:
                # a worker's named pipe would block whatever opens it
                files = [
                    entry.path
                    for entry in entries
                    if entry.name.endswith(".db") and entry.is_file(follow_symlinks=False)
                ]
            collector: Any = multiprocess.MultiProcessCollector
            return list(collector.merge(files, accumulate=True))
        except Exception as error:
            if last:
                # a full disk or a damaged file: the other metrics are still useful
                log_omitted(error)
            else:
                time.sleep(0.02)  # a worker may be creating its file
    return []


def log_omitted(error: Exception) -> None:
    logging.getLogger("gunicorn.error").warning(
        "gunicorn-passenger: the program's own metrics are not shown: %s: %s",
        type(error).__name__,
        printable(str(error)[:1000]),
    )


def sum_when_imported() -> None:
    """Call :func:`sum_default_registry`, at once or when the program has imported ``prometheus_client``."""
    call_when_imported("prometheus_client", sum_default_registry)


def sum_default_registry() -> None:
    """Have the default registry of ``prometheus_client`` show the sums over all workers.

    So an unmodified ``start_http_server()`` or ``make_wsgi_app()`` shows the same numbers in every worker.
    The collectors of the process, the platform and the garbage collector are omitted: they would describe
    whichever worker responds. Collectors of the program's own stay.
    """
    try:
        import prometheus_client
        from prometheus_client import metrics, multiprocess, values
    except ImportError:
        return  # then the program counts nothing with it
    if not getattr(values.ValueClass, "_multiprocess", True):
        return  # it was imported before the directory was set up, and the log says so
    registry = prometheus_client.REGISTRY
    per_process = (
        metrics.MetricWrapperBase,
        multiprocess.MultiProcessCollector,
        prometheus_client.ProcessCollector,
        prometheus_client.PlatformCollector,
        prometheus_client.GCCollector,
    )

    class SummedRegistry(prometheus_client.CollectorRegistry):
        """The default registry, as :func:`sum_default_registry` changes it."""

        def collect(self) -> Iterator[Any]:
            yield from sum_metrics()
            for collector in list(self._collector_to_names):
                if not isinstance(collector, per_process):
                    yield from collector.collect()

        def restricted_registry(self, names: Iterable[str]) -> Any:
            return _RestrictedRegistry(self, frozenset(names))

    registry.__class__ = SummedRegistry


class _RestrictedRegistry:
    """The samples of a registry that a scraper asks for (``?name[]=...``)."""

    def __init__(self, registry: Any, names: frozenset[str]) -> None:
        self._registry, self._names = registry, names

    def collect(self) -> Iterator[Any]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if sample.name in self._names]
            if metric.samples:
                yield metric


def exporter_calls() -> bool:
    """Whether a server that shows the default registry makes this call."""
    return called_in_packages(_EXPORTERS)
