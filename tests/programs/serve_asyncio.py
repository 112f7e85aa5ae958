"""asyncio.start_server, its loop in a thread."""

import asyncio
import threading

from answering import PORT, answer, application, listening  # noqa: F401 (what gunicorn serves)


async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", PORT)
    listening(server.sockets[0])
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
else:
    threading.Thread(target=asyncio.run, args=(main(),), daemon=True).start()
