"""Where gunicorn's arbiter meets the broker: hooks, forks, the start and the end.

Runs in: the master's main thread. Must never: let a failure of the broker stop gunicorn.
"""
