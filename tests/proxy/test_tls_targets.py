"""Targets over https."""

import contextlib
import ssl
import threading

import pytest
import trustme
from http_client import Client
from proxy_laboratory import (
    MODES,
    Message,
    Origin,
    accept,
    answer,
    get,
    labels,
    read_response,
    refuse,
    request,
)
from upstream_sockets import Upstream, connect


class Certificates:
    """A private authority, and a certificate of it for localhost."""

    def __init__(self, home):
        self.authority = trustme.CA()
        self.file = str(home / "authority.pem")
        self.authority.cert_pem.write_to_path(self.file)

    def server(self, *names, client=False):
        """A server's TLS context."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.authority.issue_cert(*names).configure_cert(context)
        if client:
            context.verify_mode = ssl.CERT_REQUIRED
            self.authority.configure_trust(context)
        return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def secured(origins, port, certificates):
    """An https target whose certificate authority is unknown."""
    return origins(port, b"secret", tls=certificates.server("localhost", "127.0.0.1"))


@MODES
@pytest.mark.parametrize("scheme", ["https", "wss"])
def test_https_without_verification(lab, secured, port, mode, scheme):
    where = lab.serve(f"'{scheme}://localhost:{port}/base', secure=False", mode)
    assert labels(where, 2) == [b"secret"] * 2
    assert secured.paths == ["/base/x"] * 2
    assert {number for number, _ in secured.requests} == {1}


@MODES
@pytest.mark.parametrize("options", ["", ", secure=True"])
def test_https_is_verified(lab, secured, port, mode, options):
    where = lab.serve(f"'https://localhost:{port}'{options}", mode)
    assert refuse(where).status == 502
    log = lab.wait_log("(GET /x): 502").lower()
    assert "certificate" in log
    assert "traceback" not in log
    assert secured.requests == []


@MODES
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_https_with_a_private_authority(lab, secured, port, certificates, mode, host):
    lab.run(f"import ssl\ncontext = ssl.create_default_context(cafile={certificates.file!r})")
    agent = "agent=http_proxy.Agent(ssl_context=context)"
    where = lab.serve(f"'https://{host}:{port}', change_origin=True, {agent}", mode)
    assert get(where).text == b"secret"
    assert secured.requests[0][1].get("host") == [f"{host}:{port}"]


def test_https_with_the_certificate_of_another(lab, origins, port, certificates):
    origin = origins(port, tls=certificates.server("other.example"))
    lab.run(f"import ssl\ncontext = ssl.create_default_context(cafile={certificates.file!r})")
    where = lab.serve(f"'https://localhost:{port}', agent=http_proxy.Agent(ssl_context=context)")
    # the client's Host is not the name that is verified
    assert refuse(where, request("/x", "Host: other.example")).status == 502
    assert "certificate" in lab.wait_log("(GET /x): 502").lower()
    assert origin.requests == []


def test_https_with_a_clients_certificate(lab, origins, port, certificates, tmp_path):
    origins(port, b"known", tls=certificates.server("localhost", client=True))
    pem = str(tmp_path / "client.pem")
    certificates.authority.issue_cert("client.example").private_key_and_cert_chain_pem.write_to_path(pem)
    lab.run(f"import ssl\ncontext = ssl.create_default_context(cafile={certificates.file!r})")
    where = lab.serve(f"'https://localhost:{port}', agent=http_proxy.Agent(ssl_context=context)")
    assert refuse(where).status == 502
    lab.run("context.load_cert_chain(" + repr(pem) + ")")
    where = lab.serve(f"'https://localhost:{port}', agent=http_proxy.Agent(ssl_context=context)")
    assert get(where).text == b"known"


def test_the_name_that_tls_is_told(lab, origins, port, certificates):
    context = certificates.server("localhost")
    names = []
    context.sni_callback = lambda sock, name, context: names.append(name)
    origins(port, tls=context)
    assert get(lab.serve(f"'https://localhost:{port}', secure=False")).status == 200
    assert names == ["localhost"]


def test_https_carries_large_bodies(lab, port, certificates, origins):
    class Echo(Origin):
        def reply(self, message):
            return answer(body=message.text)

    body = b"0123456789abcdef" * 100_000
    with Echo(port, tls=certificates.server("localhost")):
        where = lab.serve(f"'https://localhost:{port}', secure=False")
        client = Client(where)
        try:
            client.request("POST", "/", body)
            assert client.getresponse().read() == body
        finally:
            client.close()


def test_https_to_a_target_that_speaks_http(lab, upstream, port):
    with connect(lab.serve(f"'https://localhost:{port}', secure=False")) as client:
        wire = accept(upstream, client.send(request()))
        wire.more()
        wire.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").close()
        assert read_response(client).status == 502
    assert "Traceback" not in lab.wait_log("(GET /x): 502")


def test_http_to_a_target_that_speaks_tls(lab, secured, port):
    assert refuse(lab.serve(f"{port}")).status == 502
    assert "Traceback" not in lab.wait_log("(GET /x): 502")


def test_an_upgrade_over_tls(lab, port, certificates):
    context = certificates.server("localhost")
    with Upstream(port) as upstream, connect(lab.serve(f"'wss://localhost:{port}', secure=False")) as client:
        client.send(request("/x", "Connection: Upgrade", "Upgrade: websocket"))
        wire = accept(upstream, client)
        wire.sock = context.wrap_socket(wire.sock, server_side=True)
        assert Message(wire.head()).get("upgrade") == ["websocket"]
        wire.send(b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert Message(client.head()).status == 101
        client.send(b"up")
        assert wire.exactly(2) == b"up"
        wire.send(b"down" * 50000)
        assert client.exactly(200_000) == b"down" * 50000
        wire.sock.close()
        assert client.ended()


def test_an_upload_over_https_does_not_stop_the_download(lab, port, certificates):
    """The target writes, and reads nothing meanwhile."""
    where = lab.serve(f"'https://localhost:{port}', secure=False")
    size = 16 << 20
    with Upstream(port) as upstream, connect(where) as client:

        def upload():
            with contextlib.suppress(OSError):  # the response is complete before the request is
                client.send(request("/", f"Content-Length: {size}", method="POST") + bytes(size))

        uploading = threading.Thread(target=upload)
        uploading.start()
        wire = upstream.accept()
        wire.sock = certificates.server("localhost").wrap_socket(wire.sock, server_side=True)
        wire.sock.settimeout(60)
        wire.head()
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size
        downloading = threading.Thread(target=wire.send, args=(head + bytes(size),))
        downloading.start()
        _, body = client.response()
        downloading.join()
        uploading.join()
        assert len(body) == size
