"""An S3 server on this machine (moto's), in a process of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

from tests.environment import clean_environment
from tests.waiting import wait_for
from tinkerapi.server.up_process import free_port

KEYS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    # Nothing of the shell's or the machine's.
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
}


class S3Server:
    """A server that keeps everything in memory."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def make_bucket(self, name: str) -> None:
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT")  # noqa: S310
        urllib.request.urlopen(request).close()  # noqa: S310

    def check_credentials(self, *, check: bool) -> None:
        """Whether to refuse unknown credentials, as all are."""
        request = urllib.request.Request(  # noqa: S310
            f"{self.url}/moto-api/reset-auth",
            data=b"0" if check else b"inf",
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(request).close()  # noqa: S310

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(self.url).close()  # noqa: S310
        except OSError:
            return False
        return True


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server until the end of the block."""
    server = S3Server(free_port())
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-p", str(server.port)]
    with subprocess.Popen(
        command,
        env={**clean_environment(), **KEYS},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_for(server.answers)
            yield server
        finally:
            process.kill()
