"""The operating system: sockets, owners of ports, /proc, the runtime directory, printable text.

Process: every process. Never: import another part of the package than ``config`` and ``errors``.
"""
