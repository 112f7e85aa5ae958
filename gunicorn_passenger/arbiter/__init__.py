"""Where gunicorn's arbiter meets the broker: hooks, forks, the start and the end.

Process: the master, in its main thread; a worker (``hooked_worker``, ``program_import``, ``null_heartbeat``).
Never: let a failure of the broker stop gunicorn.
"""
