"""waitress.serve."""

import threading

from answering import PORT, application
from waitress import serve as waitress_serve


def serve():
    waitress_serve(application, host="127.0.0.1", port=PORT)


if __name__ == "__main__":
    serve()
else:
    threading.Thread(target=serve, daemon=True).start()
