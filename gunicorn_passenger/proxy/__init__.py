"""The reverse proxy: targets, options, header rewriting, upstream connections, tunnels.

Runs in: a worker or plain Python, wherever it is mounted. Must never: know of the master or of other servers.
"""
