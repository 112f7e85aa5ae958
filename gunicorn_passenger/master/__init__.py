"""What the gunicorn master holds: the ports, their placement, and the broker that serves the workers.

Process: the master, in the broker's thread. Around a fork, a start and a reload, the arbiter's thread calls
the broker, ``listener_sync`` and ``boot_failures``. Never: block, or trust a worker.
"""
