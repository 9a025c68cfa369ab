"""The manual's nginx.conf before a whole server, with a self-signed certificate:

apt-get install nginx-light openssl
python -m tests.deployment.nginx
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from tests.deployment.proxied import Proxied, adapted, proxied_server, running, speaks_tls
from tests.server import free_port
from tests.waiting import wait_for

SECONDS = 65.0
"""Longer than nginx waits by default."""

AROUND = """
daemon off;
pid {folder}/nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/bodies;
    proxy_temp_path {folder}/answers;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {server}
}}
"""
"""What Debian's /etc/nginx/nginx.conf has around a file of conf.d, in a folder of our own."""


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost, and its key."""
    certificate, key = folder / "train.pem", folder / "train.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    name += ["-addext", "basicConstraints=critical,CA:FALSE"]  # the SDK takes no authority for it
    subprocess.run(
        [*command, *name, "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    return certificate, key


def main() -> None:
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        certificate, key = self_signed(folder)
        with proxied_server(folder, port) as server:
            changes = {
                "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
                "train.example.com": "localhost",
                "/etc/ssl/train.pem": str(certificate),
                "/etc/ssl/train.key": str(key),
                "127.0.0.1:8000": f"127.0.0.1:{server.port}",
            }
            config = folder / "nginx.conf"
            config.write_text(AROUND.format(folder=folder, server=adapted("nginx.conf", changes)))
            with running(["nginx", "-c", str(config)], folder / "nginx.log"):
                wait_for(lambda: speaks_tls(port, certificate))
                Proxied(server, f"https://localhost:{port}", certificate).check_all(
                    folder, seconds=SECONDS
                )
    print("nginx: keys, SDK, stream, large bodies and long polls pass")


if __name__ == "__main__":
    main()
