"""The manual's Caddyfile before a whole server: TLS, keys, streams, large bodies, long polls."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.deployment.proxied import (
    Proxied,
    adapted,
    proxied_server,
    running,
    speaks_tls,
)
from tests.server import free_port
from tests.waiting import wait_for

pytestmark = pytest.mark.acceptance

CADDY = str(Path(sys.executable).with_name("caddy"))

OPTIONS = """{
	admin off
	skip_install_trust
	auto_https disable_redirects
}
"""


def test_everything_passes_through_caddy(tmp_path: Path) -> None:
    port = free_port()
    certificate = tmp_path / "caddy" / "pki" / "authorities" / "local" / "root.crt"
    with proxied_server(tmp_path, port) as server:
        caddyfile = tmp_path / "Caddyfile"
        caddyfile.write_text(
            OPTIONS
            + adapted(
                "Caddyfile",
                {
                    # Its own authority signs, as no public one signs for localhost.
                    "train.example.com {": f"https://localhost:{port} {{\n\ttls internal",
                    "127.0.0.1:8000": f"127.0.0.1:{server.port}",
                },
            )
        )
        with running(
            [CADDY, "run", "--config", str(caddyfile), "--adapter", "caddyfile"],
            tmp_path / "caddy.log",
            XDG_DATA_HOME=str(tmp_path),
            XDG_CONFIG_HOME=str(tmp_path),
        ):
            wait_for(lambda: speaks_tls(port, certificate))
            Proxied(server, f"https://localhost:{port}", certificate).check_all(
                tmp_path, seconds=2.0
            )
