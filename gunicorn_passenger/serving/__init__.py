"""What a worker (or plain Python) runs: servers, connections, the replaced ``bind`` and ``listen``."""
