"""Unmodified servers: Python's ``bind`` and ``listen`` are replaced, so that they get the master's sockets.

Process: a worker.
Never: change a socket other than a TCP listener.
"""
