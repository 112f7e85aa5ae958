"""Configuration: addresses, host names, the port allocation, settings, and the errors of listening.

Process: every process. Never: open a socket or act on a setting.
"""
