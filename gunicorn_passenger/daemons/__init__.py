"""``spawn()``: processes that live as long as the application, and the supervisor that is their parent.

Process: each that calls ``spawn()`` (``api``, ``spec``, ``run_as``), the master (``requested``, ``manager``,
``sockets``, ``lifecycle``, ``supervisor_client``), plain Python (``standalone``), the supervisor
(``supervisor``), a daemon (``function_runner``). Never: a process that outlives the application.
"""
