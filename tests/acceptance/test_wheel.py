"""A built wheel runs on its own: pages, documents, pictures and static files are inside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import requests

from tests.server import CONVERSATION, ROOT, Server, free_port
from tests.tiny_model import make_tiny_model
from tests.waiting import LONG_SECONDS

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # otherwise it would contain deleted files
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    shutil.rmtree(ROOT / "build")
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    listed = subprocess.run(
        ["/usr/bin/env", "git", "ls-files", "tinkerapi", "training", "futures", "templates"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    wanted = {f"tinkerapi/{path}" if path.startswith("templates/") else path for path in listed}

    missing = wanted - set(zipfile.ZipFile(wheel).namelist()) - {"tinkerapi/templates"}

    assert missing == set()


def test_the_installed_wheel_serves_everything(wheel: Path, tmp_path: Path) -> None:
    """In a separate environment, which shares only the project's dependencies."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True
    )
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    # A plain path, so that this checkout's own editable installation is not borrowed too.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--quiet", "--python", str(tmp_path / "venv")]
    subprocess.run([*install, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    home = tmp_path / "home"
    home.mkdir()
    server = Installed(
        data_dir=tmp_path,
        port=free_port(),
        root=home,
        environment={
            "TINKERAPI_BASE_MODEL": str(make_tiny_model(tmp_path / "model")),
            "TINKERAPI_DATA_DIR": "",
            "HOME": str(home),
            "PYTHONPATH": "",
        },
    )
    try:
        server.start()
        pages = {
            path: requests.get(server.url + path, timeout=LONG_SECONDS)
            for path in ("/docs/", "/docs/architecture/", "/admin/login/", "/api/docs")
        }
        style = requests.get(server.url + "/static/tinkerapi/admin.css", timeout=LONG_SECONDS)
        body = {"model_id": "m", "data": [CONVERSATION], "loss_fn": "cross_entropy"}
        trained = requests.post(
            server.url + "/api/v1/forward_backward", json=body, timeout=LONG_SECONDS
        )
    finally:
        server.stop()

    assert {path: page.status_code for path, page in pages.items()} == dict.fromkeys(pages, 200)
    assert style.status_code == 200
    assert trained.json()["num_tokens"] > 0
    assert (home / ".local" / "share" / "tinkerapi" / "postgres").is_dir()


class Installed(Server):
    """A server started by the environment's own ``tinkerapi`` command."""

    def command_line(self, *arguments: str) -> list[str]:
        return [str(self.data_dir / "venv" / "bin" / "tinkerapi"), *arguments]
