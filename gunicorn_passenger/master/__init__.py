"""What the gunicorn master holds: the ports, their placement, and the broker that answers the workers.

Runs in: the master, in the broker's thread. Must never: block, or trust a worker.
"""
