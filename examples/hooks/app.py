"""A plain WSGI application. gunicorn.conf.py starts its second server."""


def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"Hello\n"]
