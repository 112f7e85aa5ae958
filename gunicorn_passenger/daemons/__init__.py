"""``spawn()``: processes that live as long as the application, and the supervisor that is their parent.

Process: the one that calls ``spawn()`` (``api``, ``spec``, ``run_as``), the master (``requested``,
``manager``, ``sockets``, ``daemon_socket``, ``lifecycle``, ``supervisor_client``), plain Python
(``standalone``), the supervisor (``supervisor``, ``supervisor_loop``, ``supervised_process``,
``process_tree``), its child (``daemon_exec``), a daemon (``function_runner``). Never: a process that outlives
the application.
"""
