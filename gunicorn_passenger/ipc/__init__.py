"""Between the master and a worker: messages with file descriptors, and the scoreboard in shared memory.

Runs in: the master and the workers. Must never: decide anything.
"""
