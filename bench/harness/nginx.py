"""nginx, as a proxy, as an upstream, or in front of a server."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .processes import Command, running, wait_for
from .site import Site, new_site
from .usage import family

#: nginx is where the PATH of an ordinary user does not lead.
os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"

#: The most clients at a time.
_CLIENTS = 2000

#: In one process beside its master, with everything that it writes below a directory.
NGINX = """{user}
daemon off;
worker_processes 1;
worker_rlimit_nofile {files};
pid {home}/nginx.pid;
error_log stderr;
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    keepalive_timeout 1000s;
    keepalive_requests 1000000000;
    client_body_temp_path {home}/client_body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    {http}
}}
"""


def nginx_command(home: Path, http: str) -> Command:
    user = "user root;" if os.geteuid() == 0 else ""
    limits = {"files": 4 * _CLIENTS, "connections": 3 * _CLIENTS}
    (home / "nginx.conf").write_text(NGINX.format(user=user, home=home, http=http, **limits))
    return ["nginx", "-e", "stderr", "-p", home, "-c", home / "nginx.conf"]


#: How nginx passes requests on: as Debian's packages configure it, with HTTP/1.0 and a connection for each,
#: and with connections that it keeps.
DEFAULT = "proxy_pass http://unix:{server}:;"
KEPT = """
    proxy_pass http://server;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
"""
_FRONT = """
    upstream server {{ server unix:{server}; keepalive 32; keepalive_requests 1000000000; }}
    server {{
        listen unix:{socket};
        location / {{
            proxy_set_header Host $http_host;
            {pass_on}
        }}
    }}
"""


@contextlib.contextmanager
def nginx_in_front(first: Site, site: Site, pass_on: str) -> Iterator[tuple[Site, list[int]]]:
    """Where the clients of a server connect: to nginx, whose processes are returned, too.

    :param pass_on: :data:`DEFAULT` or :data:`KEPT`; when it is empty, they connect to the server.
    """
    if not pass_on:
        yield site, []
        return
    with new_site(first) as before:
        pass_on = pass_on.format(server=site.socket)
        http = _FRONT.format(server=site.socket, socket=before.socket, pass_on=pass_on)
        with running(nginx_command(before.home, http), before.home, first.home, site.load_core) as process:
            wait_for(process, before.socket.exists, "it accepted connections")
            yield before, family(process.pid)
