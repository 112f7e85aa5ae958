"""What the gunicorn master holds: the ports, their placement, and the broker that serves the workers.

Process: the master, in the broker's thread. Never: block, or trust a worker.
"""
