"""Unmodified servers: Python's ``bind`` and ``listen`` replaced, so that they get the master's sockets.

Runs in: a worker. Must never: change what a socket does that is not a TCP listener.
"""
