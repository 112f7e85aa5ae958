"""``spawn()``: processes that live as long as the application, and the supervisor that is their parent.

Runs in: whatever calls ``spawn()``, the master (``manager``), the supervisor's own process, a daemon
(``function_runner``).
"""
