"""A fresh Debian in a folder, in which commands run by chroot; needs debootstrap and root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

RELEASE = "bookworm"
"""The one whose Python is 3.11."""

MOUNTS = ("proc", "sys", "dev")

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "DEBIAN_FRONTEND": "noninteractive",
    "LC_ALL": "C.UTF-8",
}

_OF_THE_MACHINE = (
    "/etc/resolv.conf",
    "/etc/pip.conf",
    "/etc/xdg/pip/pip.conf",
    "/etc/xdg/pip/constraints.txt",
    "/root/.config/pip/pip.conf",
)
"""Files by which this machine reaches its package indexes."""

AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
"""Those that this machine's package indexes are signed by."""

_PACKAGES = ("/opt/wheels", "/opt/pypi", "/opt/pypi-more", "/root/.cache/pip")
"""Folders of packages that those files may name, and pip's own."""


class Debian:
    """One such folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self) -> None:
        """A copy of ``DEBIAN_BASE`` if that names a folder of debootstrap's; else a new one."""
        if base := os.environ.get("DEBIAN_BASE"):
            self.copy_from(Debian(Path(base)))
        else:
            subprocess.run(
                ["debootstrap", "--variant=minbase", RELEASE, str(self.folder)],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        for name in _OF_THE_MACHINE:
            if Path(name).exists():
                target = self.inside(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(name, target)
        # The package ca-certificates writes that file anew.
        if AUTHORITIES.exists():
            shutil.copyfile(AUTHORITIES, self.inside("/etc/authorities.crt"))
        for folder in ("sources.list.d", "apt.conf.d"):
            for path in Path("/etc/apt", folder).glob("*"):
                if path.suffix in (".sources", "") or path.parent.name == "apt.conf.d":
                    shutil.copyfile(path, self.inside(str(path)))

    def inside(self, path: str) -> Path:
        """A path of the Debian as one of this machine."""
        return self.folder / path.lstrip("/")

    def copy_from(self, other: Debian) -> None:
        """Become a copy of another one that is not mounted."""
        subprocess.run(
            ["cp", "-a", "--reflink=auto", str(other.folder), str(self.folder)], check=True
        )

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        """With the kernel's file systems, for programs that need them."""
        done: list[str] = []
        try:
            for name in [*MOUNTS, *(name for name in _PACKAGES if Path(name).is_dir())]:
                inside = self.inside(name)
                inside.mkdir(parents=True, exist_ok=True)
                outside = Path("/", name)
                subprocess.run(["mount", "--rbind", str(outside), str(inside)], check=True)
                subprocess.run(["mount", "--make-rslave", str(inside)], check=True)
                done.append(name)
            yield
        finally:
            for name in reversed(done):
                inside = str(self.inside(name))
                subprocess.run(["umount", "--recursive", "--lazy", inside], check=False)
            left = Path("/proc/self/mountinfo").read_text()
            if f" {self.folder.resolve()}/" in left:
                # Whoever deletes the folder now would delete this machine's files.
                print(f"something is still mounted below {self.folder}; unmount it", flush=True)
                os._exit(1)

    def command(self, words: list[str], *, user: str = "root", folder: str = "/") -> list[str]:
        """The command line that runs ``words`` in it."""
        script = 'cd "$0" && exec "$@"'
        # runuser would stay as the parent, and kill the program two seconds after a signal.
        drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        as_user = [] if user == "root" else drop
        return ["chroot", str(self.folder), *as_user, "/bin/sh", "-c", script, folder, *words]

    def run(
        self, words: list[str], environment: Mapping[str, str] | None = None, **more: str
    ) -> str:
        """The output of a command, which must succeed."""
        done = subprocess.run(
            self.command(words, **more),
            env={**ENVIRONMENT, **_reach_index(), **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout


def _reach_index() -> dict[str, str]:
    """This machine's variables for pip, and its authorities."""
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    return {**pip, "PIP_CERT": "/etc/authorities.crt"}


def copy_checkout(target: Path) -> None:
    """Copy the files of this checkout that git knows, as they are now."""
    root = Path(__file__).resolve().parents[2]
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, path, follow_symlinks=False)
