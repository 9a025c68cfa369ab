"""The checks of ``up``: the folder is ours, the port free, the models readable."""

from __future__ import annotations

import os
import re
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.platform.model_folders import make_model_folder, weights
from tests.waiting import LONG_SECONDS
from tinkerapi.server.preflight import (
    PreflightError,
    RunningServer,
    base_model_problem,
    check_port,
    is_loopback,
    keep_secret_key,
    lock_data_folder,
    resolve_host,
    running_server,
)

NOBODY = 65534

SERVER = RunningServer(pid=4711, host="127.0.0.1", port=8123)


def test_a_data_folder_has_one_server_and_says_which(tmp_path: Path) -> None:
    assert running_server(tmp_path) is None
    with lock_data_folder(tmp_path / "new", SERVER):
        assert running_server(tmp_path / "new") == SERVER
        assert running_server(tmp_path / "new") == SERVER, "asking must not take the lock"
        with (
            pytest.raises(PreflightError, match=r"process 4711, http://127.0.0.1:8123"),
            lock_data_folder(tmp_path / "new", SERVER),
        ):
            pytest.fail("two servers hold one data folder")
        assert running_server(tmp_path / "new") == SERVER, "a failed attempt must not take it"
    assert running_server(tmp_path / "new") is None


def test_a_clean_end_leaves_no_trace_and_a_killed_server_does(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), lock_data_folder(tmp_path, SERVER) as killed:
        assert killed is None
        raise KeyboardInterrupt
    with lock_data_folder(tmp_path, SERVER) as killed:
        assert killed is None
        as_it_was_killed = (tmp_path / "up.lock").read_bytes()
    (tmp_path / "up.lock").write_bytes(as_it_was_killed)

    # The kernel has released its lock; the file's contents block nobody any more.
    assert running_server(tmp_path) is None
    with lock_data_folder(tmp_path, RunningServer(pid=1, host="::1", port=1)) as killed:
        assert killed == SERVER


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),  # noqa: S104
        ("::", "http://[::1]:80"),
        ("gpu7", "http://gpu7:80"),
    ],
)
def test_a_server_has_an_address_that_this_machine_reaches(host: str, address: str) -> None:
    assert RunningServer(pid=1, host=host, port=80).address == address


def test_a_server_is_asked_by_a_name_that_it_always_allows() -> None:
    asked_by = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked_by.append(self.headers["Host"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as web:
        serving = threading.Thread(target=web.handle_request)
        serving.start()
        server = RunningServer(pid=1, host="127.0.0.1", port=web.server_port)
        assert server.answer("/readyz", timeout_seconds=LONG_SECONDS) == 200
        serving.join()

    assert asked_by == ["localhost"]


def test_the_secret_is_made_once_and_only_its_user_may_read_it(tmp_path: Path) -> None:
    secret = keep_secret_key(tmp_path)

    assert keep_secret_key(tmp_path) == secret
    assert len(secret) >= 50
    assert stat.S_IMODE((tmp_path / "secret_key").stat().st_mode) == 0o600
    assert keep_secret_key(make(tmp_path / "other")) != secret


def test_an_empty_secret_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret_key").touch()

    with pytest.raises(PreflightError, match="is empty; remove it"):
        keep_secret_key(tmp_path)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_addresses_need_no_key(host: str) -> None:
    assert is_loopback(resolve_host(host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2"])  # noqa: S104
def test_every_other_address_needs_one(host: str) -> None:
    assert resolve_host(host) == host
    assert not is_loopback(host)


def test_a_host_that_names_no_address_is_refused() -> None:
    with pytest.raises(PreflightError, match=r"--host 300\.1\.1\.1\.: "):
        resolve_host("300.1.1.1.")


@pytest.mark.parametrize("host", ["a" * 64, "a..b"])
def test_what_can_be_no_host_name_is_refused(host: str) -> None:
    with pytest.raises(PreflightError, match=f"--host {re.escape(host)}: this is not a host name"):
        resolve_host(host)


def test_localhost_is_the_address_that_every_client_tries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    six = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))
    four = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [six, four])

    assert resolve_host("localhost") == "127.0.0.1"


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PreflightError, match=f"127.0.0.1 port {port}: Address already in use"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_a_port_that_is_being_left_is_waited_for() -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    leaving = threading.Timer(0.1, taken.close)
    leaving.start()
    try:
        check_port("127.0.0.1", taken.getsockname()[1], wait_seconds=LONG_SECONDS)
    finally:
        leaving.join()


def test_a_port_shared_by_another_server_counts_as_taken() -> None:
    """Granian opens its port for sharing, so two servers would each get half the requests."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(PreflightError, match="Address already in use"):
            check_port("127.0.0.1", other.getsockname()[1])


def test_an_address_that_is_not_this_machines_is_named() -> None:
    with pytest.raises(PreflightError, match=r"cannot listen on 192\.0\.2\.1 port 8000"):
        check_port("192.0.2.1", 8000)


def test_a_whole_model_folder_has_no_problem(model_folder: Path) -> None:
    assert base_model_problem(model_folder) is None


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("config.json", "it has no config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_what_a_model_folder_lacks_is_named(model_folder: Path, missing: str, problem: str) -> None:
    (model_folder / missing).unlink()

    assert problem in str(base_model_problem(model_folder))


def test_a_model_folder_that_is_none_is_named(model_folder: Path, tmp_path: Path) -> None:
    assert base_model_problem(tmp_path / "gone") == f"there is no folder {tmp_path / 'gone'}"
    (model_folder / "config.json").write_text("{")
    assert "is not JSON" in str(base_model_problem(model_folder))
    (model_folder / "config.json").write_text("[]")
    assert "is not a JSON object" in str(base_model_problem(model_folder))


@pytest.mark.parametrize("length", range(len(weights())))
def test_weights_that_are_cut_off_anywhere_are_named(model_folder: Path, length: int) -> None:
    (model_folder / "model.safetensors").write_bytes(weights()[:length])

    problem = str(base_model_problem(model_folder))

    assert problem.startswith(f"{model_folder / 'model.safetensors'} is ")
    assert "cut off: it has" in problem or "or only its beginning" in problem


@pytest.mark.parametrize(
    "content",
    [b"PK\x03\x04 an archive", bytes(100), b"\xff" * 20, (2).to_bytes(8, "little") + b"[]"],
)
def test_a_file_that_is_no_safetensors_is_named(model_folder: Path, content: bytes) -> None:
    (model_folder / "model.safetensors").write_bytes(content)

    assert "model.safetensors is not a safetensors file" in str(base_model_problem(model_folder))


def test_weights_that_this_user_may_not_read_are_named(ordinary_user: Path) -> None:
    folder = make_model_folder(ordinary_user / "model")
    (folder / "model.safetensors").chmod(0)

    assert "model.safetensors cannot be read" in str(base_model_problem(folder))


@pytest.fixture
def ordinary_user() -> Iterator[Path]:
    """Be nobody for a test, for root may read everything; yields a folder nobody can reach."""
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), os.geteuid()
        folder.chmod(0o777)
        if user == 0:
            os.seteuid(NOBODY)
        try:
            yield folder
        finally:
            os.seteuid(user)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return make_model_folder(tmp_path / "model")


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder
