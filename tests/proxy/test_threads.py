"""The proxy in threads of a plain Python program."""

import re

from proxy_laboratory import answer

THREADS = """
import io, os, threading, time
from gunicorn_passenger import http_proxy

def environ(body, **more):
    return {{
        "REQUEST_METHOD": "POST", "SCRIPT_NAME": "", "PATH_INFO": "/", "QUERY_STRING": "",
        "SERVER_PROTOCOL": "HTTP/1.1", "SERVER_NAME": "a", "SERVER_PORT": "80", "HTTP_HOST": "a",
        "REMOTE_ADDR": "127.0.0.1", "CONTENT_LENGTH": str(len(body)), "wsgi.url_scheme": "http",
        "wsgi.version": (1, 0), "wsgi.input": io.BytesIO(body), "wsgi.errors": None,
        "wsgi.multithread": True, "wsgi.multiprocess": False, "wsgi.run_once": False, **more,
    }}

def call(environ):
    said = []
    answer = proxy.web(environ, lambda status, headers, exc_info=None: said.append(status))
    try:
        body = b"".join(answer)
    finally:
        getattr(answer, "close", lambda: None)()
    return said[0][:3], body

def thread(function):
    one = threading.Thread(target=function)
    one.start()
    one.join()

proxy = http_proxy.create_server({create})
"""


def test_threads_leave_no_descriptors(start, origins, port):
    origins(port)
    script = start.write(
        "threads.py",
        THREADS.format(create=f"{port}, '127.0.0.1', timeout=5")
        + """
def run():
    for _ in range(2):
        assert call(environ(b"hello")) == ("200", b"ok")
    done.append(1)

done, counts = [], []
for number in range(35):
    thread(run)
    if number in (4, 34):
        counts.append(len(os.listdir("/proc/self/fd")))
print("done", len(done), "descriptors", *counts)
""",
    )
    process = start.python(script)
    assert process.wait_end() == 0, process.log()
    match = re.search(r"done 35 descriptors (\d+) (\d+)", process.log())
    assert match, process.log()
    assert int(match[2]) <= int(match[1])


def test_an_early_answer_over_tls_in_a_thread(start, upstream, port, tls):
    script = start.write(
        "threads.py",
        THREADS.format(create=f"'https://localhost:{port}', secure=False")
        + """
class Slow(io.BytesIO):
    def read(self, size=-1):
        time.sleep(0.02)
        return super().read(min(size, 1000) if size > 0 else size)
    read1 = read

thread(lambda: print("got", *call(environ(bytes(40000), **{"wsgi.input": Slow(bytes(40000))}))))
""",
    )
    process = start.python(script)
    wire = upstream.accept()
    wire.sock = tls.wrap_socket(wire.sock, server_side=True)
    wire.head()
    wire.send(answer("413 Too much", body=b"no"))
    assert process.wait_end() == 0, process.log()
    assert "got 413 b'no'" in process.log()
