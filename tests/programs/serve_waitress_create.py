"""waitress.create_server and its run()."""

import threading

from answering import PORT, application, listening
from waitress import create_server


def serve():
    server = create_server(application, listen=f"127.0.0.1:{PORT}")
    listening(server.socket)
    server.run()


if __name__ == "__main__":
    serve()
else:
    threading.Thread(target=serve, daemon=True).start()
