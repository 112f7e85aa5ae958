"""What the operating system knows: sockets, owners of ports, /proc, the runtime directory, printable text.

Runs in: every process. Must never: import any other part of the package but ``config`` and ``errors``.
"""
