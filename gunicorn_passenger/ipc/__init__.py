"""Between the master and a worker: messages with file descriptors, and the scoreboard in shared memory.

Process: the master and the workers. Never: decide anything.
"""
