"""deploy/, with the real programs: web servers in front of one gunicorn, systemd's checker, Kubernetes' schemas."""

from __future__ import annotations

import dataclasses
import grp
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import websocket
import yaml
from conditions import wait_for
from free_ports import free_port
from gunicorn.config import Config
from http_client import answers, fetch, refused
from json_schemas import check_schema
from processes import ROOT, Process, Starter, require, starting

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
SOCKETIO = DEPLOY / "kubernetes-socketio"
PAGES = ROOT / "docs" / "how-to"


# --- web servers -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Site:
    """One gunicorn with what the pages and files of deploy/ configure, and the ports that it uses."""

    start: Starter
    process: Process
    second: int
    api: int
    status: int


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with starting() as start:
        second, forwarded, api, status = (free_port() for _ in range(4))
        start.write(
            "app.py",
            f"""
            import gunicorn_passenger as passenger
            from flask import Flask, request
            from flask_sock import Sock
            from gunicorn_passenger import http_proxy
            from werkzeug.middleware.proxy_fix import ProxyFix

            def behind(proxies):
                app = Flask(__name__)
                app.wsgi_app = ProxyFix(app.wsgi_app, x_for=proxies, x_proto=proxies)
                app.add_url_rule("/address", "address", lambda: f"{{request.remote_addr}} {{request.scheme}}")
                return app

            primary = behind(1)
            primary.add_url_rule("/", "connection", lambda: request.headers.get("Connection", "none"))

            @Sock(primary).route("/ws")
            def echo(ws):
                while True:
                    ws.send(ws.receive())

            second = behind(1)
            second.add_url_rule("/", "name", lambda: "second")
            passenger.create_server(second).listen({second})
            passenger.create_server(behind(2)).listen({forwarded})
            proxies = {{
                "/xfwd/address": http_proxy.create_server({forwarded}, xfwd=True, rewrite={{"^/xfwd": ""}}),
                "/plain/address": http_proxy.create_server({second}, rewrite={{"^/plain": ""}}),
            }}

            def application(environ, start_response):
                return proxies.get(environ["PATH_INFO"], primary)(environ, start_response)
            """,
        )
        start.write(
            "api.py",
            """
            async def app(scope, receive, send):
                if scope["type"] == "http":
                    await send({"type": "http.response.start", "status": 200, "headers": []})
                    await send({"type": "http.response.body", "body": b"asgi"})
            """,
        )
        command = re.search(r'spawn\("(uvicorn [^"]+)"', (PAGES / "second-server.md").read_text())[1]
        configuration = (KUBERNETES / "gunicorn.conf.py").read_text()
        assert "0.0.0.0:9101" in configuration
        start.write("gunicorn.conf.py", configuration.replace("0.0.0.0:9101", f"0.0.0.0:{status}")).open(
            "a"
        ).write(
            "import gunicorn_passenger as passenger\n"
            f'passenger.spawn("{Path(sys.executable).parent}/{command}", name="api", listen={api})\n'
        )
        process = start.gunicorn("app", "--keep-alive", "75").wait_ready()
        yield Site(start, process, second, api, status)
        # at once: a graceful stop waits for connections that the web servers keep
        process.signal(signal.SIGQUIT)
        process.wait_end()


def configured(site: Site, file: str, **replaced: str) -> str:
    """A file of deploy/ in which the addresses are those of the test."""
    text = (DEPLOY / file).read_text()
    replaced = {
        "/run/app/app.sock": site.process.socket,
        "127.0.0.1:9000": f"127.0.0.1:{site.second}",
    } | replaced
    for old, new in replaced.items():
        assert old in text, f"no {old!r} in {file}"
        text = text.replace(old, new)
    return text


USER = "user root;" if os.geteuid() == 0 else ""
TEMPORARY = "client_body_temp_path n1; proxy_temp_path n2; fastcgi_temp_path n3; uwsgi_temp_path n4; scgi_temp_path n5;"


def nginx(site: Site, port: int, second_port: int, user: str = USER) -> Process:
    servers = configured(
        site, "nginx/shop.conf",
        **{"listen 80;": f"listen 127.0.0.1:{port};", "listen 8081;": f"listen 127.0.0.1:{second_port};"},
    )  # fmt: skip
    main = f"daemon off; pid nginx.pid; error_log stderr; {user} events {{ }}"
    conf = site.start.write("nginx.conf", f"{main} http {{ access_log off; {TEMPORARY}\n{servers} }}")
    return site.start.run(require("nginx"), "-e", "stderr", "-c", conf, "-p", site.start.home)


def nginx_in_a_container(site: Site, port: int, second_port: int) -> Process:
    """As the containers run it: as another user that only has the socket's group."""
    writable = site.start.home / "container"
    writable.mkdir()
    writable.chmod(0o777)
    text = configured(
        site,
        "kubernetes/nginx.conf",
        **{
            " /tmp/": f" {writable}/",
            "access_log /dev/stdout": "access_log off",
            "listen 8080;": f"listen 127.0.0.1:{port};",
            "listen 8081;": f"listen 127.0.0.1:{second_port};",
        },
    )
    user = [require("setpriv"), "--reuid=101", "--regid=0", "--clear-groups"] if os.geteuid() == 0 else []
    conf = site.start.write("container.conf", text)
    return site.start.run(*user, require("nginx"), "-e", "stderr", "-c", conf, "-g", "daemon off;")


def caddy(site: Site, port: int, second_port: int) -> Process:
    text = configured(
        site, "caddy/Caddyfile",
        **{"shop.example.org {": f"http://:{port} {{\n bind 127.0.0.1", "http://:8081": f"http://:{second_port}"},
    )  # fmt: skip
    conf = site.start.write("Caddyfile", "{\nadmin off\n}\n" + text)
    return site.start.run(require("caddy"), "run", "--config", conf, "--adapter", "caddyfile")


def haproxy(site: Site, port: int, second_port: int) -> Process:
    text = configured(
        site, "haproxy/haproxy.cfg",
        **{"bind :80": f"bind 127.0.0.1:{port}", "bind 127.0.0.1:8081": f"bind 127.0.0.1:{second_port}"},
    )  # fmt: skip
    return site.start.run(require("haproxy"), "-db", "-f", site.start.write("haproxy.cfg", text))


@pytest.mark.parametrize("server", [nginx, nginx_in_a_container, caddy, haproxy])
def test_a_web_server_in_front(site, server):
    """Requests, client addresses, WebSockets, and a second server by path and by port."""
    port, second_port = free_port(), free_port()
    process = server(site, port, second_port)
    wait_for(lambda: not refused(port) or process.popen.poll() is not None, process.log)
    wait_for(lambda: fetch(port)[0] == 200, process.log)
    connection = fetch(port)[1]
    assert connection != "close", "the web server asked for the connection to be closed"
    assert fetch(port, "/second/") == (200, "second")
    assert fetch(second_port) == (200, "second")
    # a client cannot choose its address: the web server writes the true one
    for path in ("/address", "/second/address", "/xfwd/address", "/plain/address"):
        response = fetch(port, path, X_Forwarded_For="203.0.113.7", X_Forwarded_Proto="https")
        assert response == (200, "127.0.0.1 http"), path
    client = websocket.create_connection(f"ws://127.0.0.1:{port}/ws", timeout=30)
    try:
        for text in ("one", "two"):
            client.send(text)
            assert client.recv() == text
    finally:
        client.close()


@pytest.mark.skipif(
    os.geteuid() != 0 and "CI" not in os.environ, reason="only root can run nginx's workers as another user"
)
def test_nginx_without_permission_on_the_socket(site):
    """The page on debugging has nginx's line, and what it says to do helps."""
    port = free_port()
    process = nginx(site, port, free_port(), user="user nobody nogroup;")
    wait_for(lambda: not refused(port), process.log)
    assert fetch(port)[0] == 502
    line = re.search(r"failed \(13: Permission denied\)", process.wait_log("Permission denied").string)
    assert line[0] in (PAGES / "debugging.md").read_text()
    process.stop()
    port = free_port()
    process = nginx(
        site, port, free_port(), user=f"user nobody {grp.getgrgid(os.stat(site.process.socket).st_gid)[0]};"
    )
    wait_for(lambda: not refused(port), process.log)
    assert fetch(port)[0] == 200


def test_a_body_that_is_too_large(site):
    port = free_port()
    nginx(site, port, free_port())
    wait_for(lambda: not refused(port), "nginx")
    assert fetch(port, method="POST", Content_Length="20000000")[0] == 413


def test_daemons_of_the_pages(site):
    """The ASGI application as a daemon, and the status application of the Kubernetes configuration."""
    wait_for(lambda: answers(site.api), "a response of the daemon")
    assert fetch(site.api) == (200, "asgi")
    wait_for(lambda: not refused(site.status), "the status daemon")
    assert fetch(site.status, "/health")[0] == 200


def test_traefik():
    """Neither Debian, PyPI nor npm has Traefik: the names that its files use are at least those that they define."""
    static = yaml.safe_load((DEPLOY / "traefik" / "traefik.yml").read_text())
    assert Path(static["providers"]["file"]["filename"]).name == "dynamic.yml"
    http = yaml.safe_load((DEPLOY / "traefik" / "dynamic.yml").read_text())["http"]
    entered = set()
    for router in http["routers"].values():
        assert router["service"] in http["services"]
        assert set(router.get("middlewares", ())) <= set(http["middlewares"])
        entered |= set(router["entryPoints"])
    assert entered == set(static["entryPoints"])
    for service in http["services"].values():
        assert service["loadBalancer"]["serversTransport"] in http["serversTransports"]


# --- systemd ---------------------------------------------------------------------------------------


def test_the_units_are_valid(tmp_path):
    program = tmp_path / "gunicorn"
    program.symlink_to(sys.executable)
    for unit in (DEPLOY / "systemd").iterdir():
        text = unit.read_text().replace("/srv/shop/venv/bin/gunicorn", str(program))
        (tmp_path / unit.name).write_text(text)
    units = [tmp_path / "shop.service", tmp_path / "shop.socket"]
    analyze = require("systemd-analyze")
    done = subprocess.run([analyze, "verify", "--man=no", *units], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "shop." in line]
    assert (complaints, done.returncode) == ([], 0), done.stderr
    # from 0 (not exposed) to 10; a service without a sandbox has 9.2
    rated = subprocess.run(
        [analyze, "security", "--offline=true", "--threshold=25", units[0]], capture_output=True, text=True
    )
    assert rated.returncode == 0, rated.stdout


# --- containers ------------------------------------------------------------------------------------


def test_compose():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        assert ("image" in service) != ("build" in service), name
        assert set(service.get("depends_on", ())) < set(compose["services"])
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).is_file(), volume
    assert (DEPLOY / compose["services"]["app"]["build"]["context"] / "Dockerfile").resolve().is_file()
    check_schema("compose-spec", DEPLOY / "compose.yaml")


def objects(folder: Path = KUBERNETES) -> list[dict]:
    """The Kubernetes objects of a folder's files."""
    found = []
    customization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    for generated in customization.get("configMapGenerator", ()):
        assert all((folder / name).is_file() for name in generated["files"])
    for name in customization["resources"]:
        if (folder / name).is_file():
            found += yaml.safe_load_all((folder / name).read_text())
        else:
            base = (folder / name).resolve()
            assert not folder.is_relative_to(base), "kustomize calls that a cycle"
            found += objects(base)
    for patch in customization.get("patches", ()):
        merge_patch(found, yaml.safe_load(patch["patch"]))
    return found


def merge_patch(found: list[dict], patch: dict) -> None:
    """A strategic merge patch, as far as the files use it: in lists, the entries with a name are merged."""

    def merged(old, new):
        if isinstance(old, dict) and isinstance(new, dict):
            return old | {key: merged(old[key], new[key]) if key in old else new[key] for key in new}
        if isinstance(old, list) and isinstance(new, list):
            by_name = {item["name"]: item for item in old}
            for item in new:
                by_name[item["name"]] = merged(by_name.get(item["name"], {}), item)
            return list(by_name.values())
        return new

    (position,) = [
        position
        for position, item in enumerate(found)
        if (item["kind"], item["metadata"]["name"]) == (patch["kind"], patch["metadata"]["name"])
    ]
    found[position] = merged(found[position], patch)


@pytest.mark.parametrize("folder", [KUBERNETES, KUBERNETES / "monitoring", SOCKETIO], ids=lambda f: f.name)
def test_kubernetes_objects_follow_the_schema(folder):
    version = kubernetes_validate.latest_version()
    names = set()
    for item in objects(folder):
        name = (item["kind"], item["metadata"]["name"])
        assert name not in names
        names.add(name)
        if item["kind"] != "PodMonitor":  # the Prometheus operator's
            kubernetes_validate.validate(item, version, strict=True)
    kinds = {
        "kubernetes": {"Deployment", "Service", "HorizontalPodAutoscaler"},
        "monitoring": {"PodMonitor"},
        "kubernetes-socketio": {
            "Deployment",
            "Service",
            "HorizontalPodAutoscaler",
            "NetworkPolicy",
            "Ingress",
        },
    }
    assert {kind for kind, _ in names} == kinds[folder.name]


def test_socketio_in_several_pods():
    """Redis is where the program looks for it, for no other pods, and a client stays with its pod."""
    named = {(item["kind"], item["metadata"]["name"]): item for item in objects(SOCKETIO)}
    app, redis = (named["Deployment", name]["spec"]["template"] for name in ("shop", "shop-redis"))
    (container,) = [c for c in app["spec"]["containers"] if c["name"] == "app"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment["PASSENGER_PORTS"]  # the patch adds one, and takes none away
    host, port = re.fullmatch(r"redis://([\w-]+):(\d+)/0", environment["REDIS_URL"]).groups()
    service = named["Service", host]["spec"]
    assert service["ports"][0]["port"] == int(port)
    assert service["selector"] == redis["metadata"]["labels"]
    policy = named["NetworkPolicy", host]["spec"]
    assert policy["podSelector"]["matchLabels"] == redis["metadata"]["labels"]
    (source,) = policy["ingress"][0]["from"]
    assert source["podSelector"]["matchLabels"] == app["metadata"]["labels"]
    assert named["Service", "shop"]["spec"]["sessionAffinity"] == "ClientIP"
    assert (
        named["Ingress", "shop"]["metadata"]["annotations"]["nginx.ingress.kubernetes.io/affinity"]
        == "cookie"
    )
    backend = named["Ingress", "shop"]["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend["port"]["name"] in {
        port["name"] for port in named["Service", backend["name"]]["spec"]["ports"]
    }


def test_kubernetes_objects_fit_together():
    deployment, service, autoscaler = objects()
    (monitor,) = objects(KUBERNETES / "monitoring")
    template = deployment["spec"]["template"]
    pod = template["spec"]
    ports = {port["name"]: port["containerPort"] for c in pod["containers"] for port in c["ports"]}
    labels = template["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert monitor["spec"]["selector"]["matchLabels"] == labels
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= set(ports)
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= set(ports)
    assert autoscaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    generated = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["configMapGenerator"]
    maps = {item["name"]: item["files"] for item in generated}
    for container in pod["containers"]:
        for mount in container["volumeMounts"]:
            volume = volumes[mount["name"]]
            assert "subPath" not in mount or mount["subPath"] in maps[volume["configMap"]["name"]]
    # nginx stops first: until then it needs the program, which has its time after that
    waits = {c["name"]: int(c["lifecycle"]["preStop"]["exec"]["command"][1]) for c in pod["containers"]}
    assert waits["nginx"] < waits["app"]
    assert pod["terminationGracePeriodSeconds"] > waits["app"] + Config().graceful_timeout
    app = next(c for c in pod["containers"] if c["name"] == "app")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert app[probe]["httpGet"] == {"path": "/health", "port": "status"}
    configuration = (KUBERNETES / "nginx.conf").read_text()
    assert f"listen {ports['web']};" in configuration
    assert f"listen {ports['second']};" in configuration
    assert f":{ports['status']}" in (KUBERNETES / "gunicorn.conf.py").read_text()
