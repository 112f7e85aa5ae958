"""A proxy as a plain WSGI callable: ``proxy_under.py SERVER PORT TARGET``, in threads, without gevent."""

import sys

from gunicorn_passenger import http_proxy

server, port, target = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

proxy = http_proxy.create_server(target, "127.0.0.1", xfwd=True, proxy_timeout=20)


@proxy.on("proxy_res")
def proxy_res(upstream_response, request):
    upstream_response.headers["X-Path"] = request.path


@proxy.on("error")
def error(exception, request, target):
    print(f"error event: {type(exception).__name__} {request.path}", flush=True)


def app(environ, start_response):
    if environ["PATH_INFO"] == "/patched":
        patched = "gevent.monkey" in sys.modules and sys.modules["gevent.monkey"].is_module_patched("socket")
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(patched).encode()]
    return proxy(environ, start_response)


if server == "wsgiref":
    from wsgiref.simple_server import make_server

    make_server("127.0.0.1", port, app).serve_forever()
elif server == "werkzeug":
    from werkzeug.serving import run_simple

    run_simple("127.0.0.1", port, app, threaded=True)
elif server == "waitress":
    import waitress

    waitress.serve(app, host="127.0.0.1", port=port, threads=8)
elif server == "cheroot":
    from cheroot.wsgi import Server

    Server(("127.0.0.1", port), app, numthreads=8).start()
