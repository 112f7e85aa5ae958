"""``spawn()``: processes that live as long as the application, and the supervisor that is their parent.

Process: the one that calls ``spawn()`` (``api``, ``spec``, ``daemon_errors``), the master (``requested``,
``manager``, ``state``, ``sockets``, ``daemon_socket``, ``lifecycle``, ``supervisor_client``, ``run_as``),
plain Python (``standalone``, ``run_as``), the supervisor (``supervisor``, ``supervisor_loop``,
``supervised_process``, ``process_tree``), its child (``daemon_exec``), a daemon (``function_runner``).
Never: leave a process behind that the supervisor may end.
"""
