"""What can be configured: addresses, the ports allocated to the account, settings.

Runs in: every process. Must never: open a socket or act on a setting.
"""
