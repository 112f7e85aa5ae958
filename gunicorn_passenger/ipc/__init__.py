"""Between processes: messages with descriptors, mailboxes between workers, and counters in shared memory.

Process: the master and the workers. Never: decide about a port; ``accept_balance`` alone decides something,
namely who accepts next.
"""
