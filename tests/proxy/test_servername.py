"""``servername``: the name that the certificate of an ``https`` target must have, where it is not the host."""

import ssl

import trustme
from free_ports import free_port
from proxy_laboratory import Origin, get, request


def test_the_certificate_and_the_target_have_another_name(gunicorn, tmp_path):
    lab = gunicorn.scene()
    authority = trustme.CA()
    file = str(tmp_path / "authority.pem")
    authority.cert_pem.write_to_path(file)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("internal.example").configure_cert(context)
    told = []
    context.sni_callback = lambda sock, name, _: told.append(name)
    port = free_port()
    lab.run(f"import ssl\ncontext = ssl.create_default_context(cafile={file!r})")
    target = f"'https://127.0.0.1:{port}', agent=http_proxy.Agent(ssl_context=context)"
    with Origin(port, b"secret", tls=context) as origin:
        assert get(lab.serve(target)).status == 502
        where = lab.serve(f"{target}, servername='internal.example'")
        assert get(where, request("/x", "Host: public.example")).text == b"secret"
        assert get(lab.serve(f"{target}, servername='other.example'")).status == 502
        ((_, message),) = origin.requests
        assert message.get("host") == ["public.example"]
    assert told == [None, "internal.example", "other.example"]
